"""The second rounding, behind quantized activations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ptq_tdq import Calls
from ptq_tdq.config import Config
from ptq_tdq.quantized_model import QuantizedModel
from ptq_tdq.recon import UnitReport, reconstruct, weights

CHOICES = {"rounding": "gptq", "bias_lr": 1e-3}


def run(wrap: Any, config: Config, calls: Calls) -> tuple[QuantizedModel, list[UnitReport]]:
    quantized, reports = wrap(config), list[UnitReport]()
    reconstruct(quantized, calls, config, on_unit=reports.append)
    return quantized, [r for r in reports if r.phase == "activations"]


def codes(quantized: QuantizedModel) -> dict[str, torch.Tensor]:
    return {name: torch.cat([w.codes for w in layer.weight_quantizers() if w.codes is not None], 1)
            for name, layer in quantized.layers().items()}  # fmt: skip


def test_it_changes_codes_and_lowers_the_loss(wrap: Any, choose: Callable[..., Config], calls: Calls) -> None:
    once, before = run(wrap, choose(**CHOICES), calls)
    twice, after = run(wrap, choose(**CHOICES, round_again=True), calls)
    assert any(not torch.equal(a, b) for a, b in zip(codes(once).values(), codes(twice).values(), strict=True))
    assert all(r.after <= r.before for r in after)
    assert sum(r.after for r in after) < sum(r.after for r in before)


def test_a_rounding_that_raises_the_loss_is_undone(
    wrap: Any, choose: Callable[..., Config], calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = choose(**CHOICES)
    expected, _ = run(wrap, config, calls)
    honest = weights.round_unit

    def wreck(unit: Any, *rest: Any) -> Any:
        found = honest(unit, *rest)
        if unit.quantizers() and all(q.source is not None for q in unit.quantizers()):  # the second time
            for layer in unit.layers():
                layer.shift += 100
            return unit.outputs(rest[1])
        return found

    monkeypatch.setattr(weights, "round_unit", wreck)
    found, _ = run(wrap, config.changed({"round_again": True}), calls)
    mine, theirs = codes(found), codes(expected)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    for a, b in zip(found.layers().values(), expected.layers().values(), strict=True):
        assert a.shift is None or b.shift is None or torch.equal(a.shift, b.shift)
