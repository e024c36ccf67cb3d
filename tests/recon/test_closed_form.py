"""Closed-form rounding of whole layers: in blocks of columns, beside rounding to nearest and the layer as one block."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from unit_calls import call_of

from ptq_tdq import preset
from ptq_tdq.config import Config
from ptq_tdq.modules import QuantLayer, layer_kind
from ptq_tdq.recon import moments
from ptq_tdq.recon.closed_form import round_unit
from ptq_tdq.recon.unit import Unit
from ptq_tdq.recon.weights import initialize
from ptq_tdq.records import LayerRecord, QuantizerRecord

CONFIG = preset("default", scheme="W3A8")


def rounded(layer: nn.Module, full: Tensor, seen: Tensor, splits: tuple[int, ...], config: Config = CONFIG) -> float:
    """The mean squared error that rounding has left in the outputs, beside that of rounding to nearest."""
    kind = layer_kind(layer)
    assert kind is not None
    inputs = tuple(QuantizerRecord(f"a.{i}", 8, "static", "mse") for i in range(len(splits) - 1))
    unit = Unit("a", QuantLayer(layer, LayerRecord("a", kind, "a", splits, 3, inputs)), torch.zeros(len(full)))
    (quantized,) = unit.layers()
    initialize(quantized, config)
    quantized.weights_enabled = True
    target, errors = layer(full), []
    for round_it in (False, True):
        if round_it:
            calls = [call_of("a", value) for value in (full, seen)]
            round_unit(unit, *calls, config, torch.Generator().manual_seed(0))
        errors.append(float((quantized(seen) - target).square().mean()))
    return errors[1] / errors[0]


def mixed(rows: int, channels: int, *places: int) -> Tensor:
    """Channels that go together, as those of a network do."""
    few = torch.randn(rows, channels // 3, *places)
    mix = torch.randn(channels, channels // 3) / channels**0.5
    return torch.einsum("bc...,dc->bd...", few, mix) + 0.1 * torch.randn(rows, channels, *places)


LAYERS = {
    "conv": (nn.Conv2d(24, 8, 3, padding=1), (6, 6), (0, 24)),
    "split": (nn.Conv2d(24, 8, 3, padding=1), (6, 6), (0, 10, 24)),
    "linear": (nn.Linear(216, 8), (), (0, 216)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_blocks_make_up_for_those_before_them(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, places, splits = LAYERS[name]
    layer.requires_grad_(False)
    torch.manual_seed(0)
    full = mixed(800 if name == "linear" else 60, splits[-1], *places)
    seen = full + 0.02 * torch.randn_like(full)
    whole = rounded(layer, full, seen, splits)
    monkeypatch.setattr(moments, "COLUMNS", 54)  # 4 blocks of 6 channels with 9 taps
    blocks = rounded(layer, full, seen, splits)
    monkeypatch.setattr(moments.Inputs, "solved", lambda *_: None)
    assert whole < blocks < 0.5 and 1.2 * blocks < rounded(layer, full, seen, splits)


def test_blocks_hold_whole_channels() -> None:
    known = moments.Inputs(4, 9 * 1500, torch.device("cpu"))
    blocks = known.blocks(9)
    assert [b.start for b in blocks[1:]] == [b.stop for b in blocks[:-1]] and blocks[-1].stop == 9 * 1500
    assert all(b.start % 9 == 0 and b.stop - b.start <= moments.COLUMNS + 9 for b in blocks) and len(blocks) == 3
