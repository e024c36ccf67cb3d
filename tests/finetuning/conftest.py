"""A small denoiser, its calls, and calibrated models of few bits of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from recorded import images
from small_denoiser import SmallDenoiser

from ptq_tdq import Calls, FinetuneConfig, QuantizedModel, calibrate, preset, record


@pytest.fixture(scope="session")
def denoiser() -> SmallDenoiser:
    torch.manual_seed(0)
    return SmallDenoiser().eval().requires_grad_(False)


@pytest.fixture(scope="session")
def calls(denoiser: SmallDenoiser) -> Calls:
    """128 trajectories of three steps; x_t is larger at large t."""
    with record(denoiser) as recorded, torch.no_grad():
        for t in (999.0, 500.0, 1.0):
            denoiser(images(128) * (0.5 + t / 1000), torch.full((128,), t))
    return recorded


@pytest.fixture(scope="session")
def calibrated(denoiser: SmallDenoiser, calls: Calls) -> Callable[..., QuantizedModel]:
    """Calibrated models by scheme and method, each made once; tests must not change them."""
    made: dict[tuple[str, str], QuantizedModel] = {}

    def of(scheme: str = "W2A4", method: str = "static") -> QuantizedModel:
        if (scheme, method) not in made:
            few = {"rounding": "gptq", "activation_iterations": 5, "compute_dtype": "float32", "eight_bit_layers": ()}
            made[scheme, method] = calibrate(denoiser, preset("default", scheme=scheme, method=method, **few), calls)
        return made[scheme, method]

    return of


@pytest.fixture(scope="session")
def choose() -> Callable[..., FinetuneConfig]:
    """Build a config of few iterations."""

    def make(**choices: Any) -> FinetuneConfig:
        few = {"iterations": 40, "batch_size": 16, "weight_lr": 1e-3, "warmup": 3, "ema": 0.8}
        return FinetuneConfig().changed({**few, "compute_dtype": "float32", **choices})

    return make
