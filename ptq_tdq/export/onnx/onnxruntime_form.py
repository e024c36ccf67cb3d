"""The form for onnxruntime: ConvInteger and MatMulInteger, whose int32 sums are exact.

QuantizeLinear along the batch axis takes one scale and zero point per sample, so a batch may mix time steps.
ConvInteger multiplies signed activations with unsigned weights (w + 128, zero point 128) and MatMulInteger the other
way round: the two combinations that onnxruntime's kernels run at full speed. Both take one zero point for all samples;
where z depends on t it is taken off after the sum, and the input is padded before it is quantized, so that

    sum (q - z) w  =  sum q w  -  z sum w          holds at the border as well.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from torch import nn

from ptq_tdq.export.onnx.geometry import conv_attributes, is_linear, padding
from ptq_tdq.export.onnx.nodes import axes
from ptq_tdq.export.onnx.portable import Portable
from ptq_tdq.export.onnx.weights import RangeWeight, along_channels, store_signed
from ptq_tdq.records import QuantizerRecord

_DTYPES = {0: np.uint8, 128: np.int8}  # by what is subtracted from the unsigned codes


@dataclass(frozen=True)
class IntegerCodes:
    """Quantized activations: ``(codes - zero) * scale``, the zero constant or int32 [batch, 1, ...]."""

    codes: ir.Value
    scale: ir.Value  # float32 [batch, 1] or [1, 1]
    zero: np.generic | ir.Value

    @property
    def operand(self) -> np.generic | None:
        """The zero point as the operator takes it: None where it has to be taken off afterwards."""
        return None if isinstance(self.zero, ir.Value) else self.zero


class OnnxRuntime(Portable):
    """Lowers to integer operators; everything between them stays float32."""

    def part(self, q: QuantizerRecord, module: nn.Module, x: ir.Value, weight: RangeWeight, rank: int) -> ir.Value:
        b, linear = self.b, is_linear(module)
        if linear:
            a = self.integers(q, x, rank, offset=0)
            acc = b("MatMulInteger", a.codes, store_signed(b, weight, 0, transposed=True), a.operand)
        else:
            moving = self.lookup.at(q.name, x, rank).zero_point is None and any(padding(module))
            a = self.integers(q, self.padded(module, x) if moving else x, rank, offset=128)
            w, attributes = store_signed(b, weight, 128), conv_attributes(module, pads=not moving)
            acc = b("ConvInteger", a.codes, w, a.operand, np.uint8(128), **attributes)
        if isinstance(a.zero, ir.Value):
            sums = weight.signed.reshape(len(weight.signed), -1).sum(1, dtype=np.int32)
            acc = b("Sub", acc, b("Mul", a.zero, along_channels(sums, rank, linear)))
        if weight.rest is not None:
            main, ones = b.many("Split", acc, axes(len(weight.scale), 1), count=2, axis=rank - 1 if linear else 1)
            acc = b("Sub", main, b("Mul", ones, along_channels(weight.rest, rank, linear)))
        return self.real(acc, a.scale, b.initializer(f"{weight.name}_scale", weight.scale), rank, linear)

    def product(self, a: QuantizerRecord, x: ir.Value, b: QuantizerRecord, y: ir.Value, transposed: bool) -> ir.Value:
        """``(A - za) (B - zb) = A B - za sum(B) - zb sum(A - za)``, sums along the contracted axis."""
        make = self.b
        left, right = self.integers(a, x, 4, offset=0), self.integers(b, y, 4, offset=128)
        columns = make("Transpose", right.codes, perm=[0, 1, 3, 2]) if transposed else right.codes
        acc = make("MatMulInteger", left.codes, columns, left.operand, right.operand)
        if isinstance(left.zero, ir.Value):
            row = make("Expand", np.uint8(1), self.lengths(columns, 1, 2))
            acc = make("Sub", acc, make("Mul", left.zero, make("MatMulInteger", row, columns, None, right.operand)))
        if isinstance(right.zero, ir.Value):
            column = make("Expand", np.int8(1), self.lengths(columns, 2, 1))
            sums = make("MatMulInteger", left.codes, column, left.operand)
            if isinstance(left.zero, ir.Value):
                count = make("Cast", make("Shape", columns, start=2, end=3), to=ir.DataType.INT32)
                sums = make("Sub", sums, make("Mul", left.zero, count))
            acc = make("Sub", acc, make("Mul", right.zero, sums))
        return self.real(acc, left.scale, right.scale, 4, False)

    def lengths(self, columns: ir.Value, *order: int) -> ir.Value:
        """The shape [1, K] (order 1, 2) or [K, 1] (order 2, 1) for the K rows of ``columns``."""
        count = self.b("Shape", columns, start=2, end=3)
        parts = {1: self.b.constant(axes(1)), 2: count}
        return self.b("Concat", *(parts[i] for i in order), axis=0)

    def integers(self, record: QuantizerRecord, x: ir.Value, rank: int, offset: int) -> IntegerCodes:
        """uint8 codes (``offset`` 0) or int8 codes less 128 (``offset`` 128)."""
        b, interval, dtype = self.b, self.lookup.at(record.name, x, rank), _DTYPES[offset]
        name, low, high = f"{record.name}.codes", dtype(-offset), dtype(interval.qtype.qmax - offset)
        narrow = interval.qtype.bits < 8
        fixed, z, zeros = interval.fixed_scale, interval.zero_point, interval.zero_points
        scale = interval.scale if fixed is None else b.constant(fixed.reshape(1, 1))
        assert scale is not None
        if fixed is not None and z is not None:
            zero: np.generic | ir.Value = dtype(z - offset)
            codes = b("QuantizeLinear", x, fixed, zero, name=None if narrow else name)
        else:
            batch = b("Shape", x, start=0, end=1)
            if z is None:
                assert zeros is not None
                integers = b("Sub", b("Cast", zeros, to=ir.DataType.INT32), np.int32(offset))
                zero = self.widen(integers, rank)
                moving = b("Cast", integers, to=ir.DataType.INT8 if offset else ir.DataType.UINT8)
            else:
                zero, moving = dtype(z - offset), b.constant(np.full((1, 1), z - offset, dtype))
            flat = (b("Expand", b("Reshape", v, axes(-1)), batch) for v in (scale, moving))
            codes = b("QuantizeLinear", x, *flat, axis=0, name=None if narrow else name)
        return IntegerCodes(b("Clip", codes, low, high, name=name) if narrow else codes, scale, zero)

    def real(self, acc: ir.Value, scale: ir.Value, other: ir.Value, rank: int, last: bool) -> ir.Value:
        """``acc * scale * other`` as float32; ``other`` is a scale, or [O] along channels (``last``: the last axis).

        The factors become one before they meet the large tensor, but never by a product whose result goes straight to
        it: onnxruntime would take ``acc * (scale * other)`` for one scale per tensor and fuse it into a wrong result.
        """
        b, y = self.b, self.b("Cast", acc, to=ir.DataType.FLOAT)
        if rank == 2:
            return b("Mul", b("Mul", y, other), scale)
        where = range(1, rank - 1) if last else range(2, rank)
        return b("Mul", y, b("Unsqueeze", b("Mul", scale, other), axes(*where)))

    def padded(self, module: nn.Module, x: ir.Value) -> ir.Value:
        """``x`` with the zeros around it that the convolution would add."""
        pad = [0, 0, *padding(module)]
        return self.b("Pad", x, axes(*pad, *pad))
