"""A denoiser of three convolutions with a trained look, its calls, and an artifact of few bits of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from recorded import images
from torch import Tensor, nn

from ptq_tdq import Calls, FinetuneConfig, QuantizedModel, calibrate, preset, record


class SmallDenoiser(nn.Module):
    """Convolutions, a shift by the time step, and an attention of the positions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)
        self.middle, self.mix = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 24)
        self.time = nn.Linear(1, 8)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        shift = self.time(timestep.float().view(-1, 1) / 1000).view(-1, 8, 1, 1)
        h = nn.functional.silu(self.first(sample) + shift)
        q, k, v = self.mix(h.flatten(2).transpose(1, 2)).chunk(3, -1)
        h = h + nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).view_as(h)
        return self.last(nn.functional.silu(self.middle(h)) + h)


@pytest.fixture(scope="session")
def denoiser() -> SmallDenoiser:
    torch.manual_seed(0)
    return SmallDenoiser().eval().requires_grad_(False)


@pytest.fixture(scope="session")
def calls(denoiser: SmallDenoiser) -> Calls:
    """256 trajectories of three steps; x_t is larger at large t."""
    with record(denoiser) as recorded, torch.no_grad():
        for t in (999.0, 500.0, 1.0):
            denoiser(images(256) * (0.5 + t / 1000), torch.full((256,), t))
    return recorded


@pytest.fixture(scope="session")
def calibrated(denoiser: SmallDenoiser, calls: Calls) -> Callable[..., QuantizedModel]:
    """Calibrated models by scheme and method, each made once; tests must not change them."""
    made: dict[tuple[str, str], QuantizedModel] = {}

    def of(scheme: str = "W2A4", method: str = "static") -> QuantizedModel:
        if (scheme, method) not in made:
            few = {"rounding": "gptq", "activation_iterations": 20, "compute_dtype": "float32", "eight_bit_layers": ()}
            made[scheme, method] = calibrate(denoiser, preset("default", scheme=scheme, method=method, **few), calls)
        return made[scheme, method]

    return of


@pytest.fixture(scope="session")
def choose() -> Callable[..., FinetuneConfig]:
    """Build a config of few iterations."""

    def make(**choices: Any) -> FinetuneConfig:
        few = {"iterations": 50, "batch_size": 16, "weight_lr": 1e-3, "warmup": 3, "ema": 0.8}
        return FinetuneConfig(**{**few, "compute_dtype": "float32", **choices})

    return make
