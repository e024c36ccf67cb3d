"""What a model keeps between its calls is told where it computes with it, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ptq_tdq import calibrate, finetune
from ptq_tdq.calls import Calls, record
from ptq_tdq.carried import carried
from ptq_tdq.config import preset
from ptq_tdq.errors import ModelError
from ptq_tdq.export.onnx import export_onnx
from tests.shared.own_denoiser import Own


class Keeping(Own):
    """Has a place to keep things in, and computes with what ``change`` makes of its features and of that."""

    def __init__(self, change: Callable[[Any, Tensor], Tensor] = lambda kept, y: y) -> None:
        super().__init__()
        self.kept, self.steps, self.change = dict[str, Any](), 0, change
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.change(self, super().forward(sample, timestep))


def every(count: int) -> Callable[[Keeping, Tensor], Tensor]:
    """Features that are computed at every so many steps."""

    def change(self: Keeping, y: Tensor) -> Tensor:
        if self.steps % count == 0:
            self.kept["deep"] = y
        self.steps += 1
        return y + self.kept["deep"]

    return change


def first(self: Keeping, y: Tensor) -> Tensor:
    return y + self.kept.setdefault("first", y)


def growing(self: Keeping, y: Tensor) -> Tensor:
    self.kept["tokens"] = torch.cat([*self.kept.values(), y], 1)
    return y + self.kept["tokens"].mean(1, True)


def moving(self: Keeping, y: Tensor) -> Tensor:
    self.mean.lerp_(y.mean((0, 1)), 0.5)
    return y + self.mean


def table(self: Keeping, y: Tensor) -> Tensor:
    if not self.kept:
        self.kept["table"] = torch.arange(4.0)
    return y + self.kept["table"]


def counting(self: Keeping, y: Tensor) -> Tensor:
    self.steps += 1
    self.kept["last"] = y
    return y + torch.randn_like(y)


@pytest.fixture(scope="module")
def calls() -> Calls:
    torch.manual_seed(0)
    with record(model := Own(), num_train_timesteps=1000) as recorded, torch.no_grad():
        for t in (999.0, 500.0, 1.0) * 2:
            model(torch.randn(2, 3, 4), torch.full((2,), t))
    return recorded


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (every(2), ["kept", "steps"]),
        (every(3), ["kept", "steps"]),
        (every(5), ["kept", "steps"]),
        (first, ["kept"]),
        (growing, ["kept"]),
        (moving, ["mean"]),
        (table, []),
        (counting, []),
        (lambda _, y: y, []),
    ],
    ids=["every 2", "every 3", "every 5", "first", "growing", "moving", "table", "counting", "nothing"],
)
def test_what_calls_depend_on_is_named(change: Any, names: list[str], calls: Calls) -> None:
    model = Keeping(change)
    assert carried(model, calls) == names
    assert not model.kept and not model.steps and not model.mean.any()


def test_who_makes_each_call_for_itself_refuses_it(calls: Calls, tmp_path: Path) -> None:
    model, config = Keeping(lambda _, y: y), preset("default", weight_iterations=1, activation_iterations=1)
    quantized = calibrate(model, config, calls)
    said = "depends on the calls before, by what it keeps in '{}' and 1 more"
    model.change = every(2)
    with pytest.raises(ModelError, match=said.format("kept")):
        calibrate(model, config, calls)
    with pytest.raises(ModelError, match=said.format("kept")):
        finetune(model, quantized, data=calls)
    with pytest.raises(ModelError, match=said.format("model.kept")):
        export_onnx(quantized, tmp_path / "model.onnx", "portable", calls, model=model)
