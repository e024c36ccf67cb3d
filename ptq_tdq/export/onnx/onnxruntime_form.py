"""The form for onnxruntime: integer operators with int32 sums.

QuantizeLinear along the batch axis takes one scale and zero point per sample, so a batch may mix time steps; the
products take one zero point for all. Where z depends on t its share is taken off behind the product, in float32:

    s_t s_o sum (q - z_t) w  =  s_t s_o sum q w  -  s_t z_t (s_o sum w)

Convolutions wider than one pixel gather their input's patches (:mod:`ptq_tdq.export.onnx.patches`) for MatMulInteger,
unsigned activations times signed weights; the others are ConvInteger, signed activations times unsigned weights. Those
are the combinations that onnxruntime has fast kernels for.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from torch import nn

from ptq_tdq.artifacts import Artifact
from ptq_tdq.export.onnx.geometry import conv_attributes, is_dense, is_grouped, is_linear, is_transposed
from ptq_tdq.export.onnx.lookup import Columns, Lookup
from ptq_tdq.export.onnx.nodes import Builder, axes
from ptq_tdq.export.onnx.patches import Patches, Size
from ptq_tdq.export.onnx.portable import Portable, swapped
from ptq_tdq.export.onnx.weights import RangeWeight, along_channels, along_rows, range_weights, store_signed
from ptq_tdq.records import LayerRecord, QuantizerRecord

Factor = ir.Value | np.float32
_SIGNED = 128  # what is subtracted from the unsigned codes to store them as int8


@dataclass(frozen=True)
class IntegerCodes:
    """Quantized activations as unsigned codes, or signed ones less by ``offset``: ``(values - zero) * scale``.

    ``zero`` is a constant of the values' type, or None where it depends on t (then ``column`` is its place in the
    tables). ``scale`` is [rows, 1, ...], or a constant.
    """

    values: ir.Value
    scale: Factor
    zero: np.generic | None
    column: int | None
    offset: int


class OnnxRuntime(Portable):
    """Lowers to integer operators; everything between them stays float32."""

    def __init__(self, b: Builder, lookup: Lookup, artifact: Artifact) -> None:
        super().__init__(b, lookup, artifact)
        self.patches = Patches(b, lookup)
        self.zeros: dict[int, Columns] = {}  # by offset: zero points in the type of the codes,
        self.scaled: dict[int, Columns] = {}  # and times the scale, in float32
        for offset, dtype in ((0, ir.DataType.UINT8), (_SIGNED, ir.DataType.INT8)):
            if lookup.scales is not None and lookup.zero_points is not None:
                zeros = b("Sub", lookup.zero_points, np.float32(offset)) if offset else lookup.zero_points
                self.zeros[offset] = lookup.table(b("Cast", zeros, to=dtype))
                self.scaled[offset] = lookup.table(b("Mul", lookup.scales, zeros))

    def layer(self, record: LayerRecord, module: nn.Module, x: ir.Value, rank: int) -> ir.Value:
        weights = range_weights(self.artifact, record)
        # what integer operators do not have, and sums over a group's channels, which are no single output channel's
        affine = any(weight.rest is not None for weight in weights)
        if not record.inputs or is_transposed(module) or (affine and is_grouped(module)):
            return super().layer(record, module, x, rank)
        b, linear, bias, size = self.b, is_linear(module), self.bias(record), Size.of(x)
        terms, shifts = [], []
        inputs = self.split(record, x, rank)
        for q, part, weight in zip(record.inputs, inputs, weights, strict=True):
            codes, sums = self.sums(q, module, part, weight, rank, size)
            terms.append(self.real(sums, codes.scale, along_channels(weight.scale, rank, linear), linear))
            if codes.column is not None:
                scaled = self.scaled[codes.offset].of(codes.column, x, rank)
                shifts.append(b("Mul", scaled, self.weight_sums(module, weight, part, rank)))
        y, wide = b.total(terms), None if bias is None else along_channels(bias, rank, linear)
        if not shifts:
            return y if wide is None else b("Add", y, wide)
        shift = b.total(shifts)
        return b("Sub", y, shift if wide is None else b("Sub", shift, wide))

    def weight_sums(self, module: nn.Module, weight: RangeWeight, x: ir.Value, rank: int) -> ir.Value:
        """What a zero point of 1 adds to each output channel: of patches at a border too, of ConvInteger not."""
        scale = along_rows(weight.scale, weight.codes.ndim)
        kernel = weight.centred.sum(1, keepdims=True).astype(np.float32) * scale
        if is_linear(module) or is_dense(module):
            total = kernel.reshape(len(kernel), -1).sum(1)
            return self.b.constant(along_channels(total, rank, is_linear(module)))
        return self.sums_inside(module, kernel, x, rank)

    def sums(
        self, q: QuantizerRecord, module: nn.Module, x: ir.Value, weight: RangeWeight, rank: int, size: Size
    ) -> tuple[IntegerCodes, ir.Value]:
        """The codes of ``x``, and int32 sums of codes (less a constant zero) times ``q - z_o``."""
        b, linear = self.b, is_linear(module)
        if linear or is_dense(module):
            codes = self.integers(q, x, rank, 0)
            left = codes.values
            if not linear:
                left = self.patches.gather(module, size, left, weight.codes.shape[1], self.zero_of(codes, x, 3))
            acc = b("MatMulInteger", left, store_signed(b, weight, 0, columns=True), codes.zero)
            acc = acc if linear else self.patches.image(module, size, acc)
        else:
            codes = self.integers(q, x, rank, _SIGNED)
            w = store_signed(b, weight, _SIGNED)
            acc = b("ConvInteger", codes.values, w, codes.zero, np.uint8(_SIGNED), **conv_attributes(module))
        if weight.rest is None:
            return codes, acc
        main, ones = b.many("Split", acc, axes(len(weight.scale), 1), count=2, axis=rank - 1 if linear else 1)
        return codes, b("Sub", main, b("Mul", ones, along_channels(weight.rest, rank, linear)))

    def product(
        self, a: QuantizerRecord, x: ir.Value, b: QuantizerRecord, y: ir.Value, transposed: bool, rank: int
    ) -> ir.Value:
        """``(A - za) (B - zb) = A B - za sum(B) - zb sum(A - za)``, sums along the contracted axis."""
        make = self.b
        left, right = self.integers(a, x, rank, 0), self.integers(b, y, rank, _SIGNED)
        columns = make("Transpose", right.values, perm=swapped(rank)) if transposed else right.values
        acc = make("MatMulInteger", left.values, columns, left.zero, right.zero)
        length = make("Shape", columns, start=rank - 2, end=rank - 1)
        zeros = self.zero_of(left, x, rank), self.zero_of(right, y, rank)
        moving = [make("Cast", zero, to=ir.DataType.INT32) for zero in zeros]
        if left.zero is None:
            row = make("Expand", np.uint8(1), make("Concat", axes(1), length, axis=0))
            sums = make("MatMulInteger", row, columns, None, right.zero)
            acc = make("Sub", acc, make("Mul", moving[0], sums))
        if right.zero is None:
            column = make("Expand", np.int8(1), make("Concat", length, axes(1), axis=0))
            sums = make("MatMulInteger", left.values, column, left.zero)
            if left.zero is None:
                sums = make("Sub", sums, make("Mul", moving[0], make("Cast", length, to=ir.DataType.INT32)))
            acc = make("Sub", acc, make("Mul", moving[1], sums))
        return self.real(acc, left.scale, right.scale, True)

    def integers(self, record: QuantizerRecord, x: ir.Value, rank: int, offset: int) -> IntegerCodes:
        """uint8 codes (``offset`` 0), or codes less 128 as int8."""
        b, interval, dtype = self.b, self.lookup.intervals[record.name], np.int8 if offset else np.uint8
        z, column, wide = interval.zero_point, interval.column, interval.qtype.bits == 8
        zero, name = None if z is None else dtype(z - offset), f"{record.name}.codes"
        scale: Factor | None = interval.scale
        if scale is not None:
            values = b("QuantizeLinear", x, scale, zero, name=name if wide else None)
        else:
            scale = moving = self.scale_of(interval, x, rank)
            assert moving is not None
            values = self._each_row(x, moving, zero, column, offset, name if wide else None)
        if not wide:
            values = b("Clip", values, dtype(-offset), dtype(interval.qtype.qmax - offset), name=name)
        assert scale is not None
        return IntegerCodes(values, scale, zero, column if z is None else None, offset)

    def _each_row(
        self, x: ir.Value, scale: ir.Value, zero: np.generic | None, column: int | None, offset: int, name: str | None
    ) -> ir.Value:
        """QuantizeLinear with a scale and zero point for each row of x, or one where x depends on no sample."""
        b, moving = self.b, None if zero is not None or column is None else self.zeros[offset].of(column, x, 2)
        if column is not None and self.lookup.lead(x) is None:
            one = [v if isinstance(v, np.generic) else b("Reshape", v, axes()) for v in (scale, moving or zero)]
            return b("QuantizeLinear", x, *one, name=name)
        zeros = b("Expand", zero, self.lookup.length(x)) if moving is None else moving
        return b("QuantizeLinear", x, *[b("Reshape", v, axes(-1)) for v in (scale, zeros)], axis=0, name=name)

    def zero_of(self, codes: IntegerCodes, x: ir.Value, rank: int) -> ir.Value:
        """The zero point of x's codes in their type: a constant, or [rows, 1, ...] of ``rank`` axes."""
        if codes.column is None:
            assert codes.zero is not None
            return self.b.constant(codes.zero)
        return self.zeros[codes.offset].of(codes.column, x, rank)

    def real(self, acc: ir.Value, scale: Factor, other: Factor | NDArray[np.float32], bare: bool) -> ir.Value:
        """``acc * scale * other`` as float32; ``other`` is a scale too, or has a number for each channel.

        The factors are multiplied first. Where ``acc`` comes straight from MatMulInteger (``bare``), onnxruntime would
        take their product for one scale per tensor and fuse it into a wrong result; the larger of it and 0, which is
        itself, keeps it from that.
        """
        b, y = self.b, self.b("Cast", acc, to=ir.DataType.FLOAT)
        if not isinstance(scale, ir.Value) and not isinstance(other, ir.Value):
            return b("Mul", y, np.asarray(scale * other))
        factor = b("Mul", scale, other)
        return b("Mul", y, b("Max", factor, np.float32(0)) if bare else factor)

    def group_norm(self, node: ir.Node) -> ir.Value | None:
        """GroupNormalization by way of InstanceNormalization, which onnxruntime has a kernel for."""
        b, (x, weight, bias) = self.b, node.inputs
        assert x is not None and x.shape is not None
        groups, epsilon = node.attributes["num_groups"].as_int(), node.attributes["epsilon"].as_float()
        one, zero = np.ones(groups, np.float32), np.zeros(groups, np.float32)
        rows = b("InstanceNormalization", b("Reshape", x, axes(0, groups, -1)), one, zero, epsilon=epsilon)
        y = b("Reshape", rows, b("Shape", x))
        weight, bias = (b("Reshape", v, axes(-1, *[1] * (x.shape.rank() - 2))) for v in (weight, bias))
        return b("Add", b("Mul", y, weight), bias)
