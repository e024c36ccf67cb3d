"""A convolution's patches as rows of a matrix (im2col), with one Gather over the pixels.

The image [rows, C, H, W] becomes pixels [rows, H W, C] with one more behind them, which holds the codes of 0; an
index per (output pixel, place in the kernel) says which pixel goes there. The index depends on the image's size alone,
is computed in the graph and shared by all layers of the same geometry and size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
from torch import nn

from ptq_tdq.export.onnx.geometry import padding
from ptq_tdq.export.onnx.lookup import Lookup
from ptq_tdq.export.onnx.nodes import Builder, Operand, axes


@dataclass(frozen=True)
class Size:
    """An image of the graph and, as a text, its height and width in terms of the graph's inputs."""

    image: ir.Value = field(compare=False)
    text: str

    @classmethod
    def of(cls, x: ir.Value) -> Size:
        """The size of ``x`` [rows, C, H, W] as the exporter knows it; one that it does not know is like no other."""
        lengths = [] if x.shape is None else [str(getattr(d, "value", d)) for d in x.shape.dims[2:]]
        return cls(x, str(x.name) if not lengths or "None" in lengths else " x ".join(lengths))


class Patches:
    """Builds patches and remembers the indices that it has built."""

    def __init__(self, b: Builder, lookup: Lookup) -> None:
        self.b, self.lookup = b, lookup
        self._indices: dict[Any, tuple[ir.Value, ir.Value]] = {}
        self._borders: dict[tuple[int, str | None], ir.Value] = {}

    def gather(self, module: nn.Module, size: Size, codes: ir.Value, channels: int, zero: Operand) -> ir.Value:
        """``codes`` [rows, C, H, W] -> [rows, pixels, kH kW C]; ``zero`` [] or [1] of the codes' type."""
        assert isinstance(module, nn.Conv2d)
        b, places = self.b, module.kernel_size[0] * module.kernel_size[1]
        pixels = b("Transpose", b("Reshape", codes, axes(0, channels, -1)), perm=[0, 2, 1])
        if _pointwise(module):
            return pixels
        if any(padding(module)):
            key = (channels, self.lookup.lead(size.image))
            if key not in self._borders or key[1] is None:
                self._borders[key] = b("Concat", self.lookup.length(size.image), axes(1, channels), axis=0)
            pixels = b("Concat", pixels, b("Expand", zero, self._borders[key]), axis=1)
        index, _ = self.index(module, size)
        return b("Reshape", b("Gather", pixels, index, axis=1), axes(0, -1, places * channels))

    def image(self, module: nn.Module, size: Size, rows: ir.Value) -> ir.Value:
        """[rows, pixels, O] -> [rows, O, H, W] of the layer's output."""
        assert isinstance(module, nn.Conv2d)
        if _pointwise(module):
            shape = self.b("Concat", axes(0, -1), self.b("Shape", size.image, start=2), axis=0)
        else:
            _, shape = self.index(module, size)
        return self.b("Reshape", self.b("Transpose", rows, perm=[0, 2, 1]), shape)

    def index(self, module: nn.Module, size: Size) -> tuple[ir.Value, ir.Value]:
        """The index int64 [pixels kH kW], and the shape that the rows are given."""
        assert isinstance(module, nn.Conv2d)
        key = (module.kernel_size, module.stride, module.dilation, tuple(padding(module)), size)
        if key not in self._indices:
            self._indices[key] = self._build(module, size.image)
        return self._indices[key]

    def _build(self, module: nn.Conv2d, x: ir.Value) -> tuple[ir.Value, ir.Value]:
        b, parts, outputs = self.b, [], []
        lengths = [b("Shape", x, start=axis, end=axis + 1) for axis in (2, 3)]
        pixels = b("Mul", *lengths)  # the number of the one behind the image
        geometry = zip(lengths, module.kernel_size, module.stride, padding(module), module.dilation, strict=True)
        for axis, (length, kernel, stride, pad, dilation) in enumerate(geometry):
            change = 2 * pad - dilation * (kernel - 1)
            count = length
            if stride != 1 or change != 0:
                count = b("Add", b("Div", b("Add", length, axes(change - 1)), axes(stride)), axes(1))
            steps = b("Range", np.int64(0), b("Squeeze", count), np.int64(1))
            starts = b("Unsqueeze", b("Mul", steps, axes(stride)) if stride != 1 else steps, axes(1))
            place = b("Add", starts, np.arange(kernel, dtype=np.int64) * dilation - pad)  # [outputs, kernel]
            inside = b("And", b("GreaterOrEqual", place, axes(0)), b("Less", place, length))
            place = b("Where", inside, place if axis else b("Mul", place, lengths[1]), pixels)
            parts.append(b("Unsqueeze", place, axes(0, 2) if axis else axes(1, 3)))  # of [H, W, kH, kW]
            outputs.append(count)
        index = b("Min", b("Add", *parts), pixels)
        return b("Reshape", index, axes(-1)), b("Concat", axes(0, -1), *outputs, axis=0)


def _pointwise(module: nn.Conv2d) -> bool:
    """Whether each pixel is a patch of its own."""
    return module.kernel_size == (1, 1) == module.stride and not any(padding(module))
