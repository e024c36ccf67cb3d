"""What phase A guarantees of modules against S_1, and which quantizers "auto" lets follow t."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ptq_tdq import Calls, QuantizedModel, record
from ptq_tdq.config import PRESETS, Config, preset
from ptq_tdq.plan import make_plan
from ptq_tdq.recon import UnitReport, reconstruct

Run = Callable[..., tuple[QuantizedModel, list[UnitReport]]]


class Growing(nn.Module):
    """Two layers: the input of ``follows`` grows eightfold with t, that of ``stays`` does not depend on t."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.follows, self.stays = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        size = (8 ** (timestep / 1000)).view(-1, 1)
        y: Tensor = self.follows(sample * size) / size
        return y + self.stays(sample)


@pytest.fixture
def growing() -> tuple[Growing, Calls]:
    model = Growing()
    t = torch.linspace(0, 990, 12).repeat(16)
    with record(model) as calls, torch.no_grad():
        model(torch.randn(len(t), 16, generator=torch.Generator().manual_seed(1)), t)
    return model, calls


@pytest.fixture
def run(growing: tuple[Growing, Calls]) -> Run:
    def go(name: str, method: str, **choices: Any) -> tuple[QuantizedModel, list[UnitReport]]:
        model, calls = growing
        few = {"scheme": "W8A4", "rounding": "nearest", "activation_iterations": 30, "compute_dtype": "float32"}
        config = preset(name, method=method, **{**few, "fixed_layers": (), "weight_only_layers": (), **choices})
        config = config.changed({"eight_bit_layers": (), "unlearned_layers": (), "attention": False})
        quantized = QuantizedModel.copy_of(model, calls.axis, make_plan(model, config, calls).layers)
        reports: list[UnitReport] = []
        reconstruct(quantized, calls, config, on_unit=reports.append)
        return quantized, [report for report in reports if report.phase == "activations"]

    return go


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("method", ["tdq", "tdq-thin"])
def test_modules_begin_at_the_loss_of_s_1_and_end_no_worse(run: Run, name: str, method: str) -> None:
    _, static = run(name, "static")
    _, modules = run(name, method)
    for one, other in zip(static, modules, strict=True):
        assert other.before <= 1.01 * one.before
        assert other.after <= one.after
        assert other.after <= other.before


def test_auto_follows_t_where_that_pays_and_says_what_it_is_worth(run: Run) -> None:
    quantized, _ = run("default", "auto")
    found = {q.name: q for layer in quantized.plan for q in layer.inputs}
    assert {name: q.method for name, q in found.items()} == {"follows": "tdq-thin", "stays": "static"}
    assert found["follows"].gain_db is not None and found["follows"].gain_db > 2
    assert found["stays"].gain_db is not None and found["stays"].gain_db < 0.5
    tables = {name: q.source.table(1000)[0] for name, q in quantized.quantizers().items() if q.source}
    assert tables["stays"].unique().numel() == 1
    ratio = tables["follows"][990] / tables["follows"][0]
    assert 4 < ratio < 16


def test_where_t_explains_nothing_auto_is_s_1(run: Run) -> None:
    """To the last bit: choosing consumes no randomness of the learning that follows."""
    of_auto, of_static = (run("default", method)[0].quantizers()["stays"].source for method in ("auto", "static"))
    assert of_auto is not None and of_static is not None
    for mine, theirs in zip(of_auto.table(1000), of_static.table(1000), strict=True):
        assert torch.equal(mine, theirs)


def test_the_default_method_is_auto() -> None:
    assert Config().method == "auto"
