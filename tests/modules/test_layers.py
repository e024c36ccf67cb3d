"""Quantized layers against the same computation written out with torch's own operators."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from ptq_tdq.affine import choose_qparams, quantize
from ptq_tdq.intervals.table import TableSource
from ptq_tdq.modules import QuantLayer, layer_kind
from ptq_tdq.records import LayerRecord, QuantizerRecord
from ptq_tdq.scheme import QType
from ptq_tdq.timeaxis import Clock

T = 10
LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "conv2d": (nn.Conv2d(6, 4, 3, stride=2, padding=1), (5, 6, 8, 8)),
    "conv2d-reflect": (nn.Conv2d(6, 4, 3, padding=1, padding_mode="reflect"), (5, 6, 8, 8)),
    "conv2d-groups": (nn.Conv2d(6, 4, 3, groups=2, dilation=2), (5, 6, 8, 8)),
    "conv1d": (nn.Conv1d(6, 4, 3, padding=1, bias=False), (5, 6, 9)),
    "linear": (nn.Linear(6, 4), (5, 6)),
    "linear-tokens": (nn.Linear(6, 4), (5, 7, 6)),
}


def wrapped(layer: nn.Module, splits: tuple[int, ...] = (0, 6), bits: int = 4) -> tuple[QuantLayer, Clock]:
    kind, clock = layer_kind(layer), Clock()
    assert kind is not None
    names = ["layer"] if len(splits) == 2 else [f"layer.{i}" for i in range(len(splits) - 1)]
    inputs = tuple(QuantizerRecord(n, bits, "static", "mse") for n in names)
    return QuantLayer(layer, LayerRecord("layer", kind, "layer", splits, bits, inputs), clock), clock


def assign(quantized: QuantLayer, bits: int = 4) -> Tensor:
    """Give each range min-max intervals per output channel; returns the weight they stand for, found with torch."""
    parts = []
    for i, weight in enumerate(quantized.part(j) for j in range(len(quantized.ranges))):
        shape = (-1,) + (1,) * (weight.ndim - 1)
        lo, hi = weight.detach().flatten(1).amin(1), weight.detach().flatten(1).amax(1)
        scale, zero = choose_qparams(lo, hi, QType(bits))
        codes = quantize(weight.detach(), scale.view(shape), zero.view(shape), QType(bits))
        quantized.assign(i, codes, scale, zero)
        parts.append(torch.fake_quantize_per_channel_affine(weight.detach(), scale, zero, 0, 0, 2**bits - 1))
    return torch.cat(parts, 1)


def operate(layer: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """The layer with another weight."""
    return torch.func.functional_call(layer, {"weight": weight}, (x,))


@pytest.mark.parametrize("name", LAYERS)
def test_with_both_quantizers_off_the_layer_is_the_original_bit_for_bit(name: str) -> None:
    layer, shape = LAYERS[name]
    x = torch.randn(shape)
    assert torch.equal(wrapped(layer)[0](x), layer(x))


@pytest.mark.parametrize("name", LAYERS)
def test_weights_and_inputs_are_quantized(name: str) -> None:
    torch.manual_seed(0)
    layer, shape = LAYERS[name]
    quantized, clock = wrapped(layer)
    weight = assign(quantized)
    x = torch.randn(shape)
    quantized.weights_enabled = True
    torch.testing.assert_close(quantized(x), operate(layer, x, weight))

    table = torch.linspace(0.1, 0.5, T)
    quantizer = quantized.inputs[0]
    quantizer.source, quantizer.enabled = TableSource(table, torch.full((T,), 7, dtype=torch.int32)), True
    t = torch.tensor([3, 0, 9, 9, 1])
    clock.set(t)
    rows = [torch.fake_quantize_per_tensor_affine(x[i], table[t[i]].item(), 7, 0, 15) for i in range(5)]
    torch.testing.assert_close(quantized(x), operate(layer, torch.stack(rows), weight))


@pytest.mark.parametrize("name", [n for n in LAYERS if n != "conv2d-groups"])
def test_a_split_layer_quantizes_its_ranges_apart(name: str) -> None:
    torch.manual_seed(0)
    layer, shape = LAYERS[name]
    quantized, clock = wrapped(layer, (0, 2, 6))
    weight = assign(quantized)
    assert [w.codes.shape[1] for w in quantized.weight_quantizers() if w.codes is not None] == [2, 4]
    axis = -1 if isinstance(layer, nn.Linear) else 1
    x = torch.randn(shape)
    clock.set(4)
    rows = []
    for quantizer, part, scale in zip(quantized.inputs, x.split([2, 4], axis), (0.1, 0.7), strict=True):
        quantizer.source = TableSource(torch.full((T,), scale), torch.full((T,), 6, dtype=torch.int32))
        quantizer.enabled = True
        rows.append(torch.fake_quantize_per_tensor_affine(part, scale, 6, 0, 15))
    quantized.weights_enabled = True
    torch.testing.assert_close(quantized(x), operate(layer, torch.cat(rows, axis), weight))


def test_finalize_leaves_the_result_and_replaces_the_weight() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 4, 3)
    quantized, _ = wrapped(layer, (0, 2, 6))
    weight = assign(quantized)
    quantized.weights_enabled = True
    x = torch.randn(2, 6, 5, 5)
    before = quantized(x)
    quantized.finalize()
    torch.testing.assert_close(layer.weight.detach(), weight)
    assert torch.equal(quantized(x), before)


def test_layers_of_other_kinds_have_no_quantized_form() -> None:
    assert layer_kind(nn.GroupNorm(1, 2)) is None and layer_kind(nn.ConvTranspose2d(1, 1, 1)) is None
    with pytest.raises(TypeError, match="ConvTranspose2d"):
        QuantLayer(nn.ConvTranspose2d(1, 1, 1), LayerRecord("a", "conv2d", "a", (0, 1), 8, ()), Clock())


def test_a_weight_per_tensor_has_one_scale() -> None:
    layer = nn.Linear(6, 4)
    quantized, _ = wrapped(layer)
    codes = torch.randint(0, 16, (4, 6))
    quantized.assign(0, codes, torch.tensor([0.25]), torch.tensor([3]))
    quantized.weights_enabled = True
    x = torch.randn(2, 6)
    torch.testing.assert_close(quantized(x), functional.linear(x, (codes - 3) * 0.25, layer.bias))
