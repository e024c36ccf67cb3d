"""The form for onnxruntime: integer operators with int32 sums, for samples that are all at one time step.

Products are MatMulInteger with the codes' zero point beside them, which onnxruntime makes one kernel of together with
the factor and the bias behind: it takes one scale and zero point for all rows. So a call is at one t, as a pipeline's
calls are, and the lookup refuses others; :class:`~ptq_tdq.export.onnx.denoiser.OnnxDenoiser` takes them apart.

Convolutions over images gather their input's patches (:mod:`ptq_tdq.export.onnx.patches`), unsigned activations times
signed weights; the others are ConvInteger, signed activations times unsigned weights. Those are the combinations that
onnxruntime has fast kernels for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from torch import nn

from ptq_tdq.artifacts import Artifact
from ptq_tdq.export.onnx.geometry import conv_attributes, is_dense, is_grouped, is_linear, is_transposed
from ptq_tdq.export.onnx.lookup import Columns, Lookup
from ptq_tdq.export.onnx.nodes import Builder, axes
from ptq_tdq.export.onnx.patches import Patches, Size
from ptq_tdq.export.onnx.portable import Portable, by_instances, swapped
from ptq_tdq.export.onnx.weights import RangeWeight, along_channels, range_weights, store_signed
from ptq_tdq.records import LayerRecord, QuantizerRecord

_SIGNED = 128  # what is subtracted from the unsigned codes to store them as int8


@dataclass(frozen=True)
class IntegerCodes:
    """Quantized activations: ``(values - zero) * scale``.

    ``zero`` is one number of the values' type. ``scale`` is one too, but [rows, 1, ...] of a dynamic quantizer
    (``by_row``).
    """

    values: ir.Value
    scale: ir.Value
    zero: ir.Value | np.generic
    by_row: bool


class OnnxRuntime(Portable):
    """Lowers to integer operators; everything between them stays float32."""

    one_step: ClassVar[bool] = True

    def __init__(self, b: Builder, lookup: Lookup, artifact: Artifact) -> None:
        super().__init__(b, lookup, artifact)
        self.patches = Patches(b, lookup)
        self.zeros: dict[int, Columns] = {}  # by what is subtracted from the codes
        for offset, dtype in ((0, ir.DataType.UINT8), (_SIGNED, ir.DataType.INT8)):
            if lookup.zero_points is not None:
                zeros = b("Sub", lookup.zero_points, np.float32(offset)) if offset else lookup.zero_points
                self.zeros[offset] = lookup.table(b("Cast", zeros, to=dtype))

    def layer(self, record: LayerRecord, module: nn.Module, x: ir.Value, rank: int) -> ir.Value:
        weights = range_weights(self.artifact, record)
        # what integer operators do not have, and sums over a group's channels, which are no single output channel's
        affine = any(weight.rest is not None for weight in weights)
        if not record.inputs or is_transposed(module) or (affine and is_grouped(module)):
            return super().layer(record, module, x, rank)
        b, dense, bias, size = self.b, is_dense(module), self.bias(record), Size.of(x)
        ranges = zip(record.inputs, self.split(record, x, rank), weights, strict=True)
        y = b.total(self.range_product(q, module, part, weight, rank, size) for q, part, weight in ranges)
        if bias is not None:
            y = b("Add", y, along_channels(bias, rank, dense or is_linear(module)))
        return self.patches.image(module, size, y) if dense else y

    def range_product(
        self, q: QuantizerRecord, module: nn.Module, x: ir.Value, weight: RangeWeight, rank: int, size: Size
    ) -> ir.Value:
        """The share of one channel range, without the bias; channels are last where there are rows of patches."""
        b, dense = self.b, is_dense(module)
        last = dense or is_linear(module)
        if last:
            codes = self.integers(q, x, rank, 0)
            left = codes.values
            if dense:
                left = self.patches.gather(module, size, left, weight.codes.shape[1], codes.zero)
            acc = b("MatMulInteger", left, store_signed(b, weight, 0, columns=True), codes.zero)
        else:
            codes = self.integers(q, x, rank, _SIGNED)
            w = store_signed(b, weight, _SIGNED)
            acc = b("ConvInteger", codes.values, w, codes.zero, np.uint8(_SIGNED), **conv_attributes(module))
        if weight.rest is not None:
            main, ones = b.many("Split", acc, axes(len(weight.scale), 1), count=2, axis=-1 if last else 1)
            acc = b("Sub", main, b("Mul", ones, along_channels(weight.rest, rank, last)))
        scale = b("Reshape", codes.scale, axes(-1, 1, 1)) if dense and codes.by_row else codes.scale
        return self.real(acc, scale, along_channels(weight.scale, rank, last), codes.by_row)

    def product(
        self, a: QuantizerRecord, x: ir.Value, b: QuantizerRecord, y: ir.Value, transposed: bool, rank: int
    ) -> ir.Value:
        make = self.b
        left, right = self.integers(a, x, rank, 0), self.integers(b, y, rank, _SIGNED)
        columns = make("Transpose", right.values, perm=swapped(rank)) if transposed else right.values
        acc = make("MatMulInteger", left.values, columns, left.zero, right.zero)
        return self.real(acc, left.scale, right.scale, left.by_row or right.by_row)

    def integers(self, record: QuantizerRecord, x: ir.Value, rank: int, offset: int) -> IntegerCodes:
        """uint8 codes (``offset`` 0), or codes less 128 as int8."""
        b, interval, dtype = self.b, self.lookup.intervals[record.name], np.int8 if offset else np.uint8
        column, wide, name = interval.column, interval.qtype.bits == 8, f"{record.name}.codes"
        by_row = interval.scale is None and column is None
        zero = self.zeros[offset].only(column) if interval.zero_point is None else dtype(interval.zero_point - offset)
        if by_row:
            scale = self.lookup.dynamic(interval, x, rank)
            rows = b("Reshape", scale, axes(-1)), b("Expand", zero, self.lookup.length(x))
            values = b("QuantizeLinear", x, *rows, axis=0, name=name if wide else None)
        else:
            scale = self.scales.only(column) if interval.scale is None else b.constant(interval.scale)
            values = b("QuantizeLinear", x, scale, zero, name=name if wide else None)
        if not wide:
            values = b("Clip", values, dtype(-offset), dtype(interval.qtype.qmax - offset), name=name)
        return IntegerCodes(values, scale, zero, by_row)

    def real(self, acc: ir.Value, scale: ir.Value, other: ir.Value | NDArray[np.float32], by_row: bool) -> ir.Value:
        """``acc * scale * other`` as float32; ``other`` is a scale too, or has a number for each channel.

        The factors are multiplied first. Where a scale has a number for each row, onnxruntime would take their product
        for one and fuse it into a wrong result; the larger of it and 0, which is itself, keeps it from that.
        """
        b = self.b
        factor = b("Mul", scale, other)
        return b("Mul", b("Cast", acc, to=ir.DataType.FLOAT), b("Max", factor, np.float32(0)) if by_row else factor)

    def group_norm(self, node: ir.Node) -> ir.Value | None:
        return by_instances(self.b, node)
