"""Rounding a unit whose finished modules are not run again: the same codes to the bit, from fewer runs."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from unit_calls import call_of

from ptq_tdq import preset
from ptq_tdq.modules import QuantLayer
from ptq_tdq.recon import replay
from ptq_tdq.recon.closed_form import round_unit
from ptq_tdq.recon.unit import Unit
from ptq_tdq.recon.weights import initialize
from ptq_tdq.records import LayerRecord, QuantizerRecord

CONFIG = preset("default", scheme="W3A8")
N = 70  # more than run at once


def layer(name: str) -> QuantLayer:
    record = LayerRecord(name, "linear", "a", (0, 12), 3, (QuantizerRecord(name, 8, "static", "mse"),))
    return QuantLayer(nn.Linear(12, 12).requires_grad_(False), record)


class Pair(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.first, self.second = layer(f"{name}.first"), layer(f"{name}.second")

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.first(x).relu()
        return y, self.second(y)


class Block(nn.Module):
    """Modules that run twice, whose outputs may be changed in place, and which may stand in another order."""

    early: Pair
    late: Pair

    def __init__(self, in_place: bool, in_order: bool = True) -> None:
        super().__init__()
        self.in_place = in_place
        for name in ("early", "late") if in_order else ("late", "early"):
            self.add_module(name, Pair(name))
        self.last = Pair("last")

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.early(x)
        if self.in_place:
            b.mul_(2)
        c, d = self.late(a + b)
        e, f = self.late(c - d)
        g, h = self.last(e + f)
        return g + h  # type: ignore[no-any-return]


def rounded(in_place: bool, in_order: bool) -> tuple[list[Tensor], Counter[str]]:
    """Codes of all layers, and how often each ran."""
    torch.manual_seed(0)
    unit = Unit("a", Block(in_place, in_order), torch.arange(N) % 4)
    ran = Counter[str]()

    def count(_: Any, __: Any, output: Tensor, *, name: str) -> None:
        ran[name] += 1

    for part in unit.layers():
        initialize(part, CONFIG)
        part.register_forward_hook(partial(count, name=part.record.name))
    full = torch.randn(N, 12)
    calls = [call_of("a", value) for value in (full, full + 0.1 * torch.randn(N, 12))]
    round_unit(unit, *calls, CONFIG, torch.Generator().manual_seed(0))
    assert not any("forward" in vars(module) for module in unit.module.modules())
    return [codes for part in unit.layers() if (codes := part.weight_quantizers()[0].codes) is not None], ran


@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
def test_codes_are_the_same_and_finished_modules_run_less(
    in_place: bool, in_order: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes, ran = rounded(in_place, in_order)
    monkeypatch.setattr(replay, "KEPT_BYTES", 0)
    again, more = rounded(in_place, in_order)
    assert len(codes) == 6 and all(map(torch.equal, codes, again))
    assert all(ran[name] <= more[name] for name in more)
    assert in_place or ran["early.first"] < more["early.first"]
    assert not in_order or ran["late.first"] < more["late.first"]


def test_what_was_changed_in_place_runs_again() -> None:
    unit = Block(in_place=True)
    kept, x = replay.Replay(unit), torch.randn(3, 12)
    for part in unit.modules():
        if isinstance(part, QuantLayer):
            initialize(part, CONFIG)
    with torch.no_grad():
        expected = unit(x)
        for _ in range(3):
            with kept.running("full precision", 0, lambda module: True):
                torch.testing.assert_close(unit(x), expected, rtol=0, atol=0)


def test_a_forward_of_ones_own_stays() -> None:
    unit = Block(in_place=False)
    own = unit.early.forward
    unit.early.forward = own  # type: ignore[method-assign]
    with replay.Replay(unit).running("quantized", 0, lambda module: True):
        assert unit.early.forward is not own
    assert vars(unit.early)["forward"] is own
