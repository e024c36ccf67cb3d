"""The portable form: standard operators only, QuantizeLinear and DequantizeLinear with constant parameters.

    u = x / s_t        q = clamp(rint(u + z_t))        y = s_t conv(q - z_t, w) + bias

The division by s_t in front and the product with s_t behind carry the time dependence, so every Q and DQ has the
constant scale 1, which all importers of ONNX understand. The weights are the artifact's codes with ``(q - z) s``
spelled out, which runtimes fold when they load the file. (Where they recognize integer weights of a product in
floating point, as behind DequantizeLinear, onnxruntime and OpenVINO quantize its other side by themselves, once more.
onnxruntime does so with the weights of a layer whose output goes straight to QuantizeLinear: a division is between.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from torch import nn

from ptq_tdq.artifacts import Artifact
from ptq_tdq.export.onnx.geometry import TRANSPOSED, conv_attributes, is_linear, is_transposed, padding
from ptq_tdq.export.onnx.lookup import Interval, Lookup
from ptq_tdq.export.onnx.nodes import Builder, axes
from ptq_tdq.export.onnx.weights import RangeWeight, along_channels, along_rows, range_weights, store_codes
from ptq_tdq.modules.layers import weight_groups
from ptq_tdq.records import LayerRecord, QuantizerRecord

ONE = np.float32(1)


@dataclass(frozen=True)
class Codes:
    """Quantized activations as float32: the grid is ``(values - zeros) * scale``, without what is None."""

    values: ir.Value
    scale: ir.Value | None
    zeros: ir.Value | None


class Portable:
    """Lowers quantized layers, attention products and lone quantizers to standard operators."""

    one_step: ClassVar[bool] = False  # whether all samples of a call have the same t
    signed_right: ClassVar[bool] = False  # the codes of a product's right operand
    divides: ClassVar[bool] = True  # by constant scales too, before QuantizeLinear

    def __init__(self, b: Builder, lookup: Lookup, artifact: Artifact) -> None:
        """Builds what all layers share, at the start of the graph."""
        self.b, self.lookup, self.artifact = b, lookup, artifact
        self.scales, self.zero_points = lookup.table(lookup.scales), lookup.table(lookup.zero_points)
        shifted = None if lookup.zero_points is None else b("Sub", lookup.zero_points, np.float32(128))
        self.signed_zero_points = lookup.table(shifted)

    # What the skeleton asks for.

    def layer(self, record: LayerRecord, module: nn.Module, x: ir.Value, rank: int) -> ir.Value:
        """The layer's output for its input ``x`` of ``rank`` axes."""
        inputs, weights = self.split(record, x, rank), range_weights(self.artifact, record)
        if record.inputs:
            parts = zip(record.inputs, inputs, weights, strict=True)
            y = self.b.total(self.part(q, module, part, weight, rank) for q, part, weight in parts)
        else:  # only the weight is quantized
            ranges = zip(inputs, weights, strict=True)
            y = self.b.total(self.operation(module, part, Portable.weight(self, module, w)) for part, w in ranges)
        bias = self.bias(record)
        return y if bias is None else self.b("Add", y, along_channels(bias, rank, is_linear(module)))

    def product(
        self, a: QuantizerRecord, x: ir.Value, b: QuantizerRecord, y: ir.Value, transposed: bool, rank: int
    ) -> ir.Value:
        """``x @ y`` of two quantized operands [rows, ..., N, d]; ``transposed``: of x and y's transpose.

        ``(A - za) (B - zb) = A B - za sum(B) - zb sum(A - za)``, sums along the contracted axis.
        """
        make, left, right = self.b, self.bare_codes(a, x, rank), self.bare_codes(b, y, rank, self.signed_right)
        rows, columns = left.values, right.values
        if transposed:
            columns = make("Transpose", columns, perm=swapped(rank))
        result = make("MatMul", rows, columns)
        if left.zeros is not None:
            sums = make("ReduceSum", columns, axes(rank - 2), keepdims=1)
            result = make("Sub", result, make("Mul", left.zeros, sums))
            rows = make("Sub", rows, left.zeros)
        if right.zeros is not None:
            sums = make("ReduceSum", rows, axes(rank - 1), keepdims=1)
            result = make("Sub", result, make("Mul", right.zeros, sums))
        scales = [scale for scale in (left.scale, right.scale) if scale is not None]
        if len(scales) == 2:
            scales = [make("Mul", *scales)]
        return make("Mul", result, scales[0]) if scales else result

    def quantizer(self, record: QuantizerRecord, x: ir.Value, rank: int) -> ir.Value:
        """``x`` on the quantizer's grid."""
        codes = self.codes(record, x, rank)
        values = self.levels(codes)
        return values if codes.scale is None else self.b("Mul", values, codes.scale)

    def group_norm(self, node: ir.Node) -> ir.Value | None:
        """What takes the place of a GroupNormalization; None leaves it."""
        return None

    # How it is done.

    def part(self, q: QuantizerRecord, module: nn.Module, x: ir.Value, weight: RangeWeight, rank: int) -> ir.Value:
        """The share of one channel range of the input, without the bias."""
        codes = self.codes(q, x, rank)
        values = self.levels(codes)
        y = self.operation(module, values, self.weight(module, weight))
        return y if codes.scale is None else self.b("Mul", y, codes.scale)

    def codes(self, record: QuantizerRecord, x: ir.Value, rank: int) -> Codes:
        """``x`` quantized; DequantizeLinear takes what does not depend on t."""
        b, interval = self.b, self.lookup.intervals[record.name]
        if interval.zero_point is None:
            return self.bare_codes(record, x, rank)
        scale, unit = self.scale_of(interval, x, rank), ONE if interval.scale is None else interval.scale
        outside = unit if scale is None and self.divides else scale
        u, own = (x, unit) if outside is None else (b("Div", x, outside), ONE)
        low = -interval.zero_point
        if interval.qtype.bits < 8:  # 8-bit codes saturate by themselves
            u = b("Clip", u, own * np.float32(low), own * np.float32(low + interval.qtype.qmax))
        zero = np.uint8(interval.zero_point)
        codes = b("QuantizeLinear", u, own, zero, name=f"{record.name}.codes")
        return Codes(b("DequantizeLinear", codes, unit, zero), scale, None)

    def levels(self, codes: Codes) -> ir.Value:
        """The codes less their zeros."""
        return codes.values if codes.zeros is None else self.b("Sub", codes.values, codes.zeros)

    def bare_codes(self, record: QuantizerRecord, x: ir.Value, rank: int, signed: bool = False) -> Codes:
        """``x`` quantized, as uint8 or, less 128, int8; nothing is left to DequantizeLinear but the change of type."""
        b, interval, offset = self.b, self.lookup.intervals[record.name], 128 if signed else 0
        scale = self.scale_of(interval, x, rank)
        if scale is None:
            assert interval.scale is not None
            scale = b.constant(interval.scale)
        u, zeros = b("Div", x, scale), None
        if interval.zero_point is None:
            assert interval.column is not None
            zeros = (self.signed_zero_points if signed else self.zero_points).of(interval.column, x, rank)
        elif interval.zero_point != offset:
            zeros = b.constant(np.float32(interval.zero_point - offset))
        u = u if zeros is None else b("Add", u, zeros)
        if interval.qtype.bits < 8:
            u = b("Clip", u, np.float32(-offset), np.float32(interval.qtype.qmax - offset))
        zero = np.int8(0) if signed else np.uint8(0)
        codes = b("QuantizeLinear", u, ONE, zero, name=f"{record.name}.codes")
        return Codes(b("DequantizeLinear", codes, ONE, zero), scale, zeros)

    def scale_of(self, interval: Interval, x: ir.Value, rank: int) -> ir.Value | None:
        """The scale for each row of x, [rows, 1, ...] of ``rank`` axes; None where it is a constant."""
        if interval.scale is not None:
            return None
        if interval.column is None:
            return self.lookup.dynamic(interval, x, rank)
        return self.scales.of(interval.column, x, rank)

    def weight(self, module: nn.Module, weight: RangeWeight) -> ir.Value:
        """The real weight [O, C, ...], or [C, O] of a Linear."""
        b, linear = self.b, is_linear(module)
        zero_point, scale = weight.zero_point, weight.scale
        if not linear:
            zero_point, scale = (along_rows(v, weight.codes.ndim) for v in (zero_point, scale))
        codes = b("Cast", store_codes(b, weight, linear), to=ir.DataType.INT32)
        centred = b("Sub", codes, b.initializer(f"{weight.name}_zero_point", zero_point))
        real = b("Cast", centred, to=ir.DataType.FLOAT)
        return b("Mul", real, b.initializer(f"{weight.name}_scale", scale))

    def operation(
        self, module: nn.Module, x: ir.Value, weight: ir.Value, bias: ir.Value | None = None, name: str | None = None
    ) -> ir.Value:
        """The layer's own operation, ``name`` being that of its node; a Linear takes no bias here."""
        b = self.b
        if is_linear(module):
            return b("MatMul", x, weight, name=name)
        if not is_transposed(module):
            return b("Conv", x, weight, bias, name=name, **conv_attributes(module))
        return b("ConvTranspose", x, self.inputs_first(module, weight), bias, name=name, **conv_attributes(module))

    def inputs_first(self, module: nn.Module, weight: ir.Value) -> ir.Value:
        """[O, C / groups, ...] as [C, O / groups, ...], the form of a transposed convolution."""
        b, groups = self.b, weight_groups(module)
        assert isinstance(module, TRANSPOSED)
        sizes = list(module.kernel_size)
        outputs, order = module.out_channels // groups, [0, 2, 1, *range(3, 3 + len(sizes))]
        grouped = b("Transpose", b("Reshape", weight, axes(groups, outputs, -1, *sizes)), perm=order)
        return b("Reshape", grouped, axes(-1, outputs, *sizes))  # as many channels as the range has

    def sums_inside(self, module: nn.Module, kernel: NDArray[np.float32], x: ir.Value, rank: int) -> ir.Value:
        """``kernel`` [O, 1, ...], sums over channels, summed over its places: [O], or [1, O, ...] where padding leaves
        some of them outside of the image.
        """
        b, linear = self.b, is_linear(module)
        if linear or not any(padding(module)):
            return b.constant(along_channels(kernel.reshape(len(kernel), -1).sum(1), rank, linear))
        # A convolution of a single channel of ones: C times less work than the layer's, and once for the whole batch.
        ones = b("Expand", np.ones((1,) * rank, np.float32), b("Concat", axes(1, 1), b("Shape", x, start=2), axis=0))
        return b("Conv", ones, kernel, **{**conv_attributes(module), "group": 1})

    def bias(self, record: LayerRecord) -> NDArray[np.float32] | None:
        """The layer's bias [O], if it has one."""
        bias = self.artifact.float_state.get(f"{record.name}.bias")
        return None if bias is None else bias.float().numpy()

    def split(self, record: LayerRecord, x: ir.Value, rank: int) -> list[ir.Value]:
        """The channel ranges of the input."""
        if len(record.splits) == 2:
            return [x]
        sizes = axes(*np.diff(record.splits).tolist())
        axis = rank - 1 if record.kind == "linear" else 1
        parts = self.b.many("Split", x, sizes, count=len(sizes), axis=axis)
        for part in parts:
            part.shape = None if x.shape is None else ir.Shape([x.shape[0], *[None] * (rank - 1)])
        return list(parts)


def by_instances(b: Builder, node: ir.Node) -> ir.Value:
    """GroupNormalization by way of InstanceNormalization, which onnxruntime and older importers have kernels for."""
    x, weight, bias = node.inputs
    assert x is not None and x.shape is not None
    groups, epsilon = node.attributes["num_groups"].as_int(), node.attributes["epsilon"].as_float()
    one, zero = np.ones(groups, np.float32), np.zeros(groups, np.float32)
    rows = b("InstanceNormalization", b("Reshape", x, axes(0, groups, -1)), one, zero, epsilon=epsilon)
    y = b("Reshape", rows, b("Shape", x))
    weight, bias = (b("Reshape", v, axes(-1, *[1] * (x.shape.rank() - 2))) for v in (weight, bias))
    return b("Add", b("Mul", y, weight), bias)


def swapped(rank: int) -> list[int]:
    """The order of axes that swaps the last two."""
    return [*range(rank - 2), rank - 1, rank - 2]
