"""Quantized layers against the same computation written out with torch's own operators."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from ptq_tdq.affine import choose_qparams, quantize
from ptq_tdq.intervals.table import TableSource
from ptq_tdq.modules import QuantLayer, layer_kind
from ptq_tdq.modules.layers import multiply_accumulates, outputs_first
from ptq_tdq.records import LayerRecord, QuantizerRecord
from ptq_tdq.scheme import QType
from ptq_tdq.timeaxis import at

T = 10
LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "conv2d": (nn.Conv2d(6, 4, 3, stride=2, padding=1), (5, 6, 8, 8)),
    "conv2d-reflect": (nn.Conv2d(6, 4, 3, padding=1, padding_mode="reflect"), (5, 6, 8, 8)),
    "conv2d-groups": (nn.Conv2d(6, 4, 3, groups=2, dilation=2), (5, 6, 8, 8)),
    "conv3d": (nn.Conv3d(6, 4, (1, 3, 2), padding=1), (5, 6, 2, 4, 3)),
    "transposed-1d": (nn.ConvTranspose1d(6, 4, 4, stride=3, padding=1, output_padding=2, dilation=2), (5, 6, 5)),
    "transposed-2d": (nn.ConvTranspose2d(6, 4, (4, 3), stride=2, padding=(1, 0), bias=False), (5, 6, 4, 3)),
    "transposed-2d-groups": (nn.ConvTranspose2d(6, 4, 2, groups=2, padding=1), (5, 6, 4, 3)),
    "transposed-3d": (nn.ConvTranspose3d(6, 4, 2, stride=(1, 2, 2)), (5, 6, 2, 3, 2)),
    "conv1d": (nn.Conv1d(6, 4, 3, padding=1, bias=False), (5, 6, 9)),
    "linear": (nn.Linear(6, 4), (5, 6)),
    "linear-tokens": (nn.Linear(6, 4), (5, 7, 6)),
}


def wrapped(layer: nn.Module, splits: tuple[int, ...] = (0, 6), bits: int = 4) -> QuantLayer:
    kind = layer_kind(layer)
    assert kind is not None
    names = ["layer"] if len(splits) == 2 else [f"layer.{i}" for i in range(len(splits) - 1)]
    inputs = tuple(QuantizerRecord(n, bits, "static", "mse") for n in names)
    return QuantLayer(layer, LayerRecord("layer", kind, "layer", splits, bits, inputs))


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
    return outputs_first(quantized.layer, torch.cat(parts, 1))  # in the layer's own form


def operate(layer: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """The layer with another weight."""
    return torch.func.functional_call(layer, {"weight": weight}, (x,))


@pytest.mark.parametrize("name", LAYERS)
def test_with_both_quantizers_off_the_layer_is_the_original_bit_for_bit(name: str) -> None:
    layer, shape = LAYERS[name]
    x = torch.randn(shape)
    assert torch.equal(wrapped(layer)(x), layer(x))


@pytest.mark.parametrize("name", LAYERS)
def test_weights_and_inputs_are_quantized(name: str) -> None:
    torch.manual_seed(0)
    layer, shape = LAYERS[name]
    quantized = wrapped(layer)
    weight = assign(quantized)
    x = torch.randn(shape)
    quantized.weights_enabled = True
    torch.testing.assert_close(quantized(x), operate(layer, x, weight))

    table = torch.linspace(0.1, 0.5, T)
    quantizer = quantized.inputs[0]
    quantizer.source, quantizer.enabled = TableSource(table, torch.full((T,), 7, dtype=torch.int32)), True
    t = torch.tensor([3, 0, 9, 9, 1])
    rows = [torch.fake_quantize_per_tensor_affine(x[i], table[t[i]].item(), 7, 0, 15) for i in range(5)]
    with at(t.float()):
        found = quantized(x)
    torch.testing.assert_close(found, operate(layer, torch.stack(rows), weight))


@pytest.mark.parametrize("name", [n for n in LAYERS if "groups" not in n])
def test_a_split_layer_quantizes_its_ranges_apart(name: str) -> None:
    torch.manual_seed(0)
    layer, shape = LAYERS[name]
    quantized = wrapped(layer, (0, 2, 6))
    weight = assign(quantized)
    assert [w.codes.shape[1] for w in quantized.weight_quantizers() if w.codes is not None] == [2, 4]
    axis = -1 if isinstance(layer, nn.Linear) else 1
    x = torch.randn(shape)
    rows = []
    for quantizer, part, scale in zip(quantized.inputs, x.split([2, 4], axis), (0.1, 0.7), strict=True):
        quantizer.source = TableSource(torch.full((T,), scale), torch.full((T,), 6, dtype=torch.int32))
        quantizer.enabled = True
        rows.append(torch.fake_quantize_per_tensor_affine(part, scale, 6, 0, 15))
    quantized.weights_enabled = True
    with at(torch.tensor([4.0])):
        found = quantized(x)
    torch.testing.assert_close(found, operate(layer, torch.cat(rows, axis), weight))


def test_finalize_leaves_the_result_and_replaces_the_weight() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 4, 3)
    quantized = wrapped(layer, (0, 2, 6))
    weight = assign(quantized)
    quantized.weights_enabled = True
    x = torch.randn(2, 6, 5, 5)
    before = quantized(x)
    quantized.finalize()
    torch.testing.assert_close(layer.weight.detach(), weight)
    assert torch.equal(quantized(x), before)


@pytest.mark.parametrize("name", LAYERS)
def test_each_row_of_a_weight_makes_one_output_channel(name: str) -> None:
    """Scaling row o of the weight [O, ...] scales channel o of the output, whatever the class."""
    layer, shape = LAYERS[name]
    weight = outputs_first(layer, layer.weight.detach())
    factors = torch.tensor([1.0, 2.0, 3.0, 4.0])
    scaled = outputs_first(layer, weight * factors.view(-1, *[1] * (weight.ndim - 1)))
    x, axis = torch.randn(shape), -1 if isinstance(layer, nn.Linear) else 1
    zero = operate(layer, x, torch.zeros_like(layer.weight))
    plain, found = layer(x) - zero, operate(layer, x, scaled) - zero
    expected = plain.movedim(axis, -1) * factors
    torch.testing.assert_close(found.movedim(axis, -1), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_multiply_accumulates_are_those_of_the_dense_operator(name: str) -> None:
    """Padding counts, as in the dense operator that libraries run."""
    layer, shape = LAYERS[name]
    x = torch.ones(shape)
    count = multiply_accumulates(layer, x, layer(x))
    if name.startswith("transposed"):
        per_input = layer.weight[0].numel()  # every input value meets each weight of its channel once
        assert count == x.numel() * per_input
    else:
        assert count == layer(x).numel() * layer.weight[0].numel()


def test_a_layer_without_outputs_computes_nothing() -> None:
    layer, x = nn.Linear(4, 8), torch.ones(2, 4)
    layer.weight, layer.bias = nn.Parameter(torch.empty(0, 4)), nn.Parameter(torch.empty(0))
    assert multiply_accumulates(layer, x, layer(x)) == 0


@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_pickled(name: str) -> None:
    layer, shape = LAYERS[name]
    x = torch.ones(shape)
    assert torch.equal(pickle.loads(pickle.dumps(wrapped(layer)))(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_layer_in_half_precision_stays_in_it(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(6, 4).to(dtype).requires_grad_(False)
    quantized = wrapped(layer)
    weight = assign(quantized)
    quantized.weights_enabled = True
    x = torch.randn(5, 6, dtype=dtype)
    assert quantized.shift is not None and quantized.shift.dtype == torch.float32
    quantized.shift += 0.25
    before = quantized(x)
    expected = functional.linear(x, weight.to(dtype), (layer.bias.float() + 0.25).to(dtype))
    assert before.dtype == dtype and torch.equal(before, expected)
    quantized.finalize()
    assert layer.weight.dtype == dtype and torch.equal(quantized(x), before)


@pytest.mark.parametrize("channels", [6, 8])
@pytest.mark.parametrize("rotated", [False, True])
def test_the_weight_of_a_finished_layer_is_what_meets_its_input(channels: int, rotated: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(channels, 4)
    original = layer.weight.detach().clone()
    record = LayerRecord(
        "layer", "linear", "layer", (0, channels), 8, (QuantizerRecord("layer", 8, "static", "mse"),), rotated=rotated
    )
    quantized = QuantLayer(layer, record)
    if not rotated:
        quantized.equalize(2.0 ** (torch.arange(channels) % 3))
    assign(quantized, bits=8)
    quantized.weights_enabled = True
    quantized.finalize()
    x = torch.randn(5, channels)
    torch.testing.assert_close(functional.linear(x, quantized.weight, quantized.bias), quantized(x))
    assert (quantized.weight - original).abs().max() < 0.02
    quantized.double()
    assert quantized.weight.dtype == torch.float64


@pytest.mark.parametrize("bias", [False, True])
def test_no_buffer_of_a_layer_is_empty(bias: bool) -> None:
    quantized = wrapped(nn.Linear(6, 4, bias=bias))
    assign(quantized)
    assert None not in [x for module in quantized.modules() for x in module._buffers.values()]
    quantized.equalize(torch.ones(6))
    assert "divisor" in dict(quantized.named_buffers()) and "divisor" not in quantized.state_dict()


def test_a_finished_layer_whose_weight_is_stored_in_8_bits_is_cast_by_its_hook() -> None:
    quantized = wrapped(nn.Linear(6, 4))
    assign(quantized)
    quantized.finalize()
    layer, x = quantized.layer, torch.randn(5, 6)
    layer.to(torch.float8_e4m3fn).register_forward_pre_hook(lambda module, args: module.float() and None)
    assert quantized(x).dtype == torch.float32


def test_layers_of_other_kinds_have_no_quantized_form() -> None:
    assert layer_kind(nn.GroupNorm(1, 2)) is None and layer_kind(nn.Embedding(2, 2)) is None
    with pytest.raises(TypeError, match="Bilinear"):
        QuantLayer(nn.Bilinear(1, 1, 1), LayerRecord("a", "linear", "a", (0, 1), 8, ()))


def test_a_weight_per_tensor_has_one_scale() -> None:
    layer = nn.Linear(6, 4)
    quantized = wrapped(layer)
    codes = torch.randint(0, 16, (4, 6))
    quantized.assign(0, codes, torch.tensor([0.25]), torch.tensor([3]))
    quantized.weights_enabled = True
    x = torch.randn(2, 6)
    torch.testing.assert_close(quantized(x), functional.linear(x, (codes - 3) * 0.25, layer.bias))
