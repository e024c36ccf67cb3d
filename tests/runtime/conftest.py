"""Kernels under test: ours where this machine can build them, and oneDNN; small models in both backends."""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ptq_tdq import calibrate, preset, record
from ptq_tdq.calls import prediction
from ptq_tdq.quantized_model import QuantizedModel
from ptq_tdq.runtime import IntegerModel
from ptq_tdq.runtime.native import open_library

CHEAP = {
    "scheme": "W4A8",
    "method": "step-table",  # follows t, and nothing is fitted
    "rounding": "nearest",
    "round_again": False,
    "rotate": "none",
    "activation_iterations": 0,
    "weight_range": "minmax",
    "activation_range": "minmax",
    "fixed_layers": (),
    "weight_only_layers": (),
    "float_input_layers": (),
}
Both = Callable[..., tuple[QuantizedModel, IntegerModel]]
TIMES = (torch.tensor(500), torch.tensor([0.5, 999.0, 20.0]))  # one for all samples, one for each


@pytest.fixture(scope="session")
def library() -> ctypes.CDLL:
    """The built kernels; a machine without a C compiler tests the torch operations alone."""
    found = open_library()
    if isinstance(found, str):
        pytest.skip(found)
    return found


@pytest.fixture(scope="session")
def both() -> Both:
    """``both(model, inputs, **choices)``: a model calibrated on calls with these inputs, simulated and in integers."""

    def make(model: nn.Module, inputs: Iterable[dict[str, Any]], **choices: Any) -> tuple[QuantizedModel, IntegerModel]:
        with torch.no_grad(), record(model, num_train_timesteps=1000) as calls:
            for arguments in inputs:
                model(**arguments)
        simulated = calibrate(model, preset("default", **CHEAP | choices), calls)
        return simulated, IntegerModel(copy.deepcopy(model), simulated.to_artifact())

    return make


@pytest.fixture(scope="session")
def alike(both: Both) -> Callable[..., IntegerModel]:
    """``alike(model, x, **choices)``: a model of x and timestep in integers, which gives what is simulated."""

    def make(model: nn.Module, x: Tensor, times: Iterable[Tensor] = TIMES, **choices: Any) -> IntegerModel:
        given = [{"x": x * (1 + t / 400), "timestep": torch.full((len(x),), t)} for t in (1000.0, 500.0, 1.0)]
        simulated, integer = both(model, given, **choices)
        for t in times:
            with torch.no_grad():
                expected, found = (prediction(each(x, t)) for each in (simulated, integer))
            difference = (found - expected).pow(2).mean()
            assert difference < 1e-4 * expected.pow(2).mean(), "a tie here or there"
        return integer

    return make
