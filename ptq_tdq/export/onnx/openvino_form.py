"""The form for OpenVINO: what its low-precision passes turn into 8-bit kernels.

They want QuantizeLinear and DequantizeLinear with constant parameters on both sides of a product, and signed weights
without a zero point. What the portable form takes off before the product is taken off behind it here:

- a zero point that depends on t:   sum (q - z) w  =  sum q w  -  z E,   E = sum of the weights inside the image
- the rest of affine 8-bit weights: with an output channel of ones, see :mod:`ptq_tdq.export.onnx.weights`
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from torch import nn

from ptq_tdq.export.onnx.geometry import is_grouped, is_linear, is_transposed
from ptq_tdq.export.onnx.nodes import axes
from ptq_tdq.export.onnx.portable import Portable
from ptq_tdq.export.onnx.weights import RangeWeight, along_channels, along_rows, store_signed
from ptq_tdq.records import QuantizerRecord


class OpenVINO(Portable):
    """Lowers to products of Q/DQ pairs with constant parameters, with corrections behind them."""

    signed_right = True
    divides = False  # its passes look for QuantizeLinear with the scale

    def part(self, q: QuantizerRecord, module: nn.Module, x: ir.Value, weight: RangeWeight, rank: int) -> ir.Value:
        if is_transposed(module) or (weight.rest is not None and is_grouped(module)):
            return super().part(q, module, x, weight, rank)
        b, linear = self.b, is_linear(module)
        codes = self.codes(q, x, rank)
        y = self.operation(module, codes.values, self.signed_weight(module, weight))
        if codes.zeros is not None:
            y = b("Sub", y, b("Mul", codes.zeros, self.weight_sums(module, weight, x, rank)))
        if weight.rest is not None:
            main, ones = b.many("Split", y, axes(len(weight.scale), 1), count=2, axis=rank - 1 if linear else 1)
            rest = along_channels(weight.rest.astype(np.float32) * weight.scale, rank, linear)
            y = b("Sub", main, b("Mul", ones, rest))
        return y if codes.scale is None else b("Mul", y, codes.scale)

    def signed_weight(self, module: nn.Module, weight: RangeWeight) -> ir.Value:
        """The real weight behind signed codes, with an output channel of ones where they need it."""
        b, linear = self.b, is_linear(module)
        scale = b.initializer(f"{weight.name}_scale", weight.signed_scale)
        return b("DequantizeLinear", store_signed(b, weight, 0, linear), scale, axis=1 if linear else 0)

    def weight_sums(self, module: nn.Module, weight: RangeWeight, x: ir.Value, rank: int) -> ir.Value:
        """E: the sum of each output channel's signed weights."""
        kernel = weight.signed.sum(1, keepdims=True) * along_rows(weight.signed_scale, weight.signed.ndim)
        return self.sums_inside(module, kernel.astype(np.float32), x, rank)
