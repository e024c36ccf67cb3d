"""One Conv2d or Linear in integers: quantize (with a norm before it, or not), then the products of codes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional

from ptq_tdq.errors import ModelError
from ptq_tdq.records import LayerRecord, QuantizerRecord
from ptq_tdq.runtime.kernels import Grid, Norm, Quantize, normalized
from ptq_tdq.runtime.products import Geometry, Products
from ptq_tdq.runtime.step import Step


@dataclass(frozen=True)
class Part:
    """One channel range of a layer: its quantizer, and the products with its weights."""

    quantizer: QuantizerRecord
    channels: tuple[int, int]
    pitch: int  # channels of its codes in memory
    products: Products


class WeightOnlyLayer(nn.Module):
    """A Linear or Conv2d with integer weights and a floating-point input: the weight is made float at each use.

    codes int8 or int16 [O, C] or [O, C, kh, kw] less their zero points, scale and bias [O]. A Conv2d has a geometry.
    """

    def __init__(self, codes: Tensor, scale: Tensor, bias: Tensor, geometry: Geometry | None = None) -> None:
        super().__init__()
        self.codes, self.scale, self.bias, self.geometry = codes, scale, bias, geometry

    @property
    def nbytes(self) -> int:
        """Bytes of its weights in memory."""
        return self.codes.nbytes + self.scale.nbytes + self.bias.nbytes

    def forward(self, x: Tensor) -> Tensor:
        weight = self.codes * self.scale.view(-1, *(1,) * (self.codes.ndim - 1))
        if (g := self.geometry) is None:
            return functional.linear(x.float(), weight, self.bias)
        top, left, bottom, right = g.padding
        padded = functional.pad(x.float(), (left, right, top, bottom)).contiguous(memory_format=torch.channels_last)
        return functional.conv2d(padded, weight, self.bias, g.stride, dilation=g.dilation, groups=g.groups)


class IntegerLayer(nn.Module):
    """A drop-in for a quantized Conv2d or Linear; ``norm`` (with SiLU or not) may be fused into its quantizer."""

    def __init__(
        self,
        record: LayerRecord,
        parts: Sequence[Part],
        padding: tuple[int, int, int, int],
        step: Step,
        quantize: Quantize,
    ) -> None:
        super().__init__()
        self.record, self.parts, self.padding, self.step, self.quantize = record, tuple(parts), padding, step, quantize
        self.norm: Norm | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of its weights in memory."""
        return sum(part.products.nbytes for part in self.parts)

    def forward(self, x: Tensor) -> Tensor:
        """As the layer that it stands for: x [B, C, H, W], or [B, ..., C] of a Linear."""
        if self.record.kind != "linear":
            return self.run(x)
        image = x.reshape(len(x), 1, prod(x.shape[1:-1]), x.shape[-1]).permute(0, 3, 1, 2)
        y = self.run(image).permute(0, 2, 3, 1)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def run(self, x: Tensor, *, shift: Tensor | None = None, onto: Tensor | None = None, up: int = 1) -> Tensor:
        """x [B, C, H, W] (a Linear's tokens as pixels) -> [B, O, H', W'].

        ``shift`` [B, C] is added before the norm; the result is added to ``onto``, whose memory it may take; ``up``
        enlarges x by nearest neighbours first. Raises :class:`ModelError` for another number of channels.
        """
        channels = self.parts[-1].channels[1]
        if x.ndim != 4 or x.shape[1] != channels:
            raise ModelError(f"The layer {self.record.name} takes {channels} channels. Got {list(x.shape)} instead.")
        norm = self.norm
        for part in self.parts:
            timed = part.quantizer.name in self.step
            if norm is not None and not timed:  # a dynamic interval needs the values
                x, norm = normalized(x, norm, shift), None
            interval = self.step.interval(part.quantizer.name, x if timed else x[:, slice(*part.channels)])
            grid = Grid(part.channels, part.pitch, part.quantizer.bits, self.padding, up)
            codes = self.quantize(x, grid, interval.scale, interval.zero_point, norm, shift)
            onto = part.products(codes, interval, onto)
        assert onto is not None
        return onto
