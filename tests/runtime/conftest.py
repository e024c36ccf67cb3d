"""Kernels under test: ours where this machine can build them, and oneDNN; small models in both backends."""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import nn

from ptq_tdq import calibrate, preset, record
from ptq_tdq.quantized_model import QuantizedModel
from ptq_tdq.runtime import IntegerModel
from ptq_tdq.runtime.native import open_library

CHEAP = {
    "scheme": "W4A8",
    "rounding": "nearest",
    "activation_iterations": 0,
    "weight_range": "minmax",
    "activation_range": "minmax",
    "fixed_layers": (),
    "weight_only_layers": (),
    "float_input_layers": (),
}
Both = Callable[..., tuple[QuantizedModel, IntegerModel]]


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
