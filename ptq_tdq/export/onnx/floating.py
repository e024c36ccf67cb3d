"""The form for hardware teams: the graph in floating point, with the names of the interval table.

No quantizer is in it; the table (CSV) beside it says where one belongs. Each name in its column ``layer`` is the name
of a node: a Conv, ConvTranspose or MatMul whose first input is to be quantized, or an Identity that stands for one
operand of an attention product. Both ranges of a split shortcut have a node of their own.

Weights are what the codes stand for, ``(q - z_o) s_o``, and biases the corrected ones, so nothing is to be learned or
searched again. The standard ``quantization_annotation`` names each weight's scale and zero point [O]; with them, q is
recovered exactly.
"""

from __future__ import annotations

import onnx_ir as ir
from torch import nn

from ptq_tdq.export.onnx.geometry import is_linear
from ptq_tdq.export.onnx.portable import Portable, swapped
from ptq_tdq.export.onnx.weights import RangeWeight, range_weights
from ptq_tdq.records import LayerRecord, QuantizerRecord

ANNOTATION = "quant_parameter_tensor_names"  # where onnx_ir looks for them


class Paired(Portable):
    """Products of operands that are quantized each by itself."""

    def product(
        self, a: QuantizerRecord, x: ir.Value, b: QuantizerRecord, y: ir.Value, transposed: bool, rank: int
    ) -> ir.Value:
        y = self.b("Transpose", y, perm=swapped(rank)) if transposed else y
        return self.b("MatMul", self.quantizer(a, x, rank), self.quantizer(b, y, rank))


class Floating(Paired):
    """Lowers to the plain operations."""

    def layer(self, record: LayerRecord, module: nn.Module, x: ir.Value, rank: int) -> ir.Value:
        b, linear, bias = self.b, is_linear(module), self.bias(record)
        terms: list[ir.Value] = []
        inputs, weights = self.split(record, x, rank), range_weights(self.artifact, record)
        names = [q.name for q in record.inputs] or [record.name]
        for name, part, weight in zip(names, inputs, weights, strict=True):
            real = self.annotated(weight, linear)
            # the first range of a convolution brings the bias
            first = None if bias is None or terms or linear else b.initializer(f"{record.name}.bias", bias)
            terms.append(self.operation(module, part, real, first, name))
            terms[-1].name = f"{name}/product"
        y = b.total(terms)
        return b("Add", y, b.initializer(f"{record.name}.bias", bias)) if linear and bias is not None else y

    def annotated(self, weight: RangeWeight, linear: bool) -> ir.Value:
        """The real weight [O, C, ...], or [C, O] of a Linear, with a note of its scale and zero point."""
        b = self.b
        real = b.initializer(weight.name, weight.real.T if linear else weight.real)
        scale = b.initializer(f"{weight.name}_scale", weight.scale)
        zero_point = b.initializer(f"{weight.name}_zero_point", weight.zero_point)
        real.meta[ANNOTATION] = {"SCALE_TENSOR": scale.name, "ZERO_POINT_TENSOR": zero_point.name}
        return real

    def quantizer(self, record: QuantizerRecord, x: ir.Value, rank: int) -> ir.Value:
        return self.b("Identity", x, name=record.name)
