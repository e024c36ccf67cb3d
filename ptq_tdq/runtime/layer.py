"""One layer in integers: quantize (with a norm before it, or not), then the products of codes.

Everything is an image for the kernels: tokens of a Linear are pixels, a Conv1d sees an image of one row, and a Conv3d
is the sum of 2-D convolutions, one for each place of its kernel in depth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from ptq_tdq.errors import ModelError, RuntimeUnsupportedError
from ptq_tdq.modules.layers import find_kind, outputs_first
from ptq_tdq.records import LayerRecord, QuantizerRecord
from ptq_tdq.rotate import rotated
from ptq_tdq.runtime.kernels import (
    NOTHING,
    Activation,
    Before,
    Grid,
    Norm,
    Quantize,
    Rotate,
    WeightOnly,
    levels,
    reference_weight_only,
)
from ptq_tdq.runtime.native_layer import NativeLayer
from ptq_tdq.runtime.products import Geometry, Products, exact_dtype
from ptq_tdq.runtime.step import Step


@dataclass(frozen=True)
class ChannelRange:
    """One channel range of a layer: its quantizer, and the products with its weights (of a Conv3d: at each depth)."""

    quantizer: QuantizerRecord
    channels: tuple[int, int]
    pitch: int  # channels of its codes in memory
    products: tuple[Products, ...]
    native: NativeLayer | None = None  # all of it at once, where that is there


class _Described(Tensor):
    """Says dtype, device and shape of a weight that exists in integers only."""

    @staticmethod
    def __new__(cls, shape: Sequence[int]) -> Self:
        made: Self = Tensor._make_wrapper_subclass(
            cls, torch.Size(shape), dtype=torch.float32, device=torch.device("cpu")
        )
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise RuntimeUnsupportedError(
            "The model computes with the weight of a quantized layer outside of that layer's call, which the integer "
            'backend cannot: use backend="simulated", or, where layers are fused, fuse them before calibration.'
        )


def laid_out(y: Tensor, x: Tensor) -> Tensor:
    """A convolution's result in memory as torch lays it out for an input x: rows of pixels for rows of pixels."""
    rows = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim, torch.contiguous_format)
    return y.contiguous() if x.is_contiguous() or not x.is_contiguous(memory_format=rows) else y


class CodedLayer(nn.Module):
    """What stands for a layer of a model: asked for sizes, strides and the like, it answers as the layer would.

    ``scale`` [O] is that of the weight; models ask a part's parameters for dtype and device.
    """

    def __init__(self, layer: nn.Module, scale: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self._layer = (layer.to("meta"),)  # no submodule: its tensors are only a description

    @property
    def layer(self) -> Any:
        """The layer itself, with a weight that has a shape and no values."""
        return self._layer[0]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Unheard by what listens for attention products, since hearing takes longer than a small operation."""
        with torch._C.DisableTorchFunction():
            return super().__call__(*args, **kwargs)

    def operation(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What the layer does with some weight [O, C / groups, ...]."""
        kind = find_kind(self.layer)
        assert kind is not None
        y: Tensor = kind.operation(self.layer, x, outputs_first(self.layer, weight), bias)
        return y

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_layer" not in self.__dict__:  # not there yet
                raise
            return _Described(self.layer.weight.shape) if name == "weight" else getattr(self.layer, name)


class WeightOnlyLayer(CodedLayer):
    """A layer with integer weights and a floating-point input: the weight is made float at each use.

    codes int8 or int16 [O, C / groups, ...], less their zero points.
    """

    def __init__(
        self,
        layer: nn.Module,
        codes: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        linear: WeightOnly = reference_weight_only,
    ) -> None:
        super().__init__(layer, scale, bias)
        self.codes, self.linear = codes, linear
        self.to_rows = False  # of pixels, where blocks follow that take images so

    @property
    def nbytes(self) -> int:
        """Bytes of its weights in memory."""
        return self.codes.nbytes + self.scale.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def forward(self, input: Tensor) -> Tensor:
        if input.is_complex():
            raise ModelError("A layer was given complex numbers; pass real ones.")
        x = input.float()
        if self.codes.ndim == 2:
            return self.linear(x, self.codes, self.scale, self.bias)
        x = x.contiguous(memory_format=torch.channels_last) if self.to_rows and x.ndim == 4 else x
        weight = self.codes * self.scale.view(-1, *(1,) * (self.codes.ndim - 1))
        return self.operation(x, weight, self.bias)


class IntegerLayer(CodedLayer):
    """A drop-in for a quantized Conv2d; a norm and an activation may be fused into its quantizer."""

    def __init__(
        self,
        layer: nn.Module,
        record: LayerRecord,
        parts: Sequence[ChannelRange],
        scale: Tensor,
        bias: Tensor | None,
        step: Step,
        quantize: Quantize,
        gain: Tensor | None = None,
        rotate: Rotate = rotated,
    ) -> None:
        super().__init__(layer, scale, bias)
        self.gain = gain  # of the input's channels
        self.rotate = rotate
        self.record, self.parts, self.step, self.quantize = record, tuple(parts), step, quantize
        self.geometry = Geometry.of(layer)

    @property
    def nbytes(self) -> int:
        """Bytes of its weights in memory."""
        return sum(products.nbytes for part in self.parts for products in part.products)

    def forward(self, input: Tensor, activation: Activation | None = None) -> Tensor:
        """As the layer that it stands for behind an activation, in float32: input [B, C, ...]."""
        return laid_out(self.convolve(self.bordered(input), activation), input)

    def convolve(self, x: Tensor, activation: Activation | None) -> Tensor:
        """x [B, C, ...] with its border, but for zeros."""
        return self.run(x, activation=activation)

    def bordered(self, x: Tensor) -> Tensor:
        """x with a border of its own values, where the layer has such a one: their codes are the same."""
        if self.layer.padding_mode == "zeros":
            return x
        return functional.pad(x, self.layer._reversed_padding_repeated_twice, mode=self.layer.padding_mode)

    def run(
        self,
        x: Tensor,
        *,
        norm: Norm | None = None,
        activation: Activation | None = None,
        shift: Tensor | None = None,
        onto: Tensor | None = None,
        up: int = 1,
    ) -> Tensor:
        """x [B, C, H, W] (a Linear's tokens as pixels) -> [B, O, H', W'].

        A ``norm`` and an ``activation`` come before the quantizer, and ``shift`` [B, C] is added before them; the
        result is added to ``onto``, whose memory it may take; ``up`` enlarges x by nearest neighbours first. Raises
        :class:`ModelError` for another number of channels.
        """
        before = self.before(activation, norm, shift)
        self.check(x, 4, before)
        return self.coded(x, before, onto, up)

    def before(self, activation: Activation | None, norm: Norm | None = None, shift: Tensor | None = None) -> Before:
        """What is done before the codes, with what is always done."""
        return Before(shift, norm, activation, self.rotate if self.record.rotated else None, self.gain)

    def coded(self, x: Tensor, before: Before, onto: Tensor | None = None, up: int = 1) -> Tensor:
        """The products of the codes of x, with all that is done before them."""
        for part in self.parts:
            timed = part.quantizer.name in self.step  # a dynamic interval needs the values
            if not timed or (before.norm is not None and before.gain is not None):
                x, before = before(x), NOTHING
            interval = self.step.interval(part.quantizer.name, x if timed else x[:, slice(*part.channels)].flatten(1))
            if part.native is not None:
                onto = part.native(x, before, interval, onto, up)
                continue
            grid = Grid(part.channels, part.pitch, part.quantizer.bits, self.geometry.padding, up)
            onto = part.products[0](self.quantize(x, grid, *interval, before), interval, onto)
        assert onto is not None
        return onto

    def check(self, x: Tensor, axes: int, before: Before = NOTHING, axis: int = 1) -> None:
        """Raise :class:`ModelError` for an x that is not of the layer's form, or of complex numbers."""
        channels = self.parts[-1].channels[1]
        if x.ndim != axes or before.channels(x.shape[axis]) != channels or x.is_complex():
            raise ModelError(
                f"The layer {self.record.name} takes {channels} channels of real numbers. "
                f"Got {x.dtype} {list(x.shape)} instead."
            )


class IntegerLinear(IntegerLayer):
    """A Linear: x [..., C], of which the first dimension holds the samples."""

    def forward(self, input: Tensor, activation: Activation | None = None) -> Tensor:
        x = input
        if not x.numel():
            return torch.zeros(*x.shape[:-1], self.layer.out_features, dtype=torch.float32)
        part, timed = self.parts[0], all(part.quantizer.name in self.step for part in self.parts)
        if part.native is not None and timed and x.ndim > 1 and len(self.parts) == 1:
            before = self.before(activation)
            self.check(x, x.ndim, before, -1)
            return part.native.of_tokens(x, before, self.step.interval(part.quantizer.name, x))
        # one interval for all: one long row of pixels, which the kernels like better than many short ones
        rows = 1 if x.ndim == 1 or (timed and self.step.alike(len(x))) else len(x)
        image = x.reshape(rows, 1, prod(x.shape[:-1]) // rows, x.shape[-1]).permute(0, 3, 1, 2)
        y = self.run(image, activation=activation).permute(0, 2, 3, 1)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def coded(self, x: Tensor, before: Before, onto: Tensor | None = None, up: int = 1) -> Tensor:
        """As for other layers; where each token has an interval of its own, each is an image of one pixel."""
        if x.shape[2:].numel() == 1 or not any(self.step.by_token(part.quantizer.name) for part in self.parts):
            return super().coded(x, before, onto, up)
        tokens = before(x).permute(0, 2, 3, 1)
        y = super().coded(tokens.reshape(-1, tokens.shape[-1], 1, 1), NOTHING)
        y = y.view(*tokens.shape[:3], -1).permute(0, 3, 1, 2)
        return y if onto is None else y + onto


class IntegerConv1d(IntegerLayer):
    """A Conv1d: x [B, C, L]."""

    def convolve(self, x: Tensor, activation: Activation | None) -> Tensor:
        return self.run(x.unsqueeze(2), activation=activation).squeeze(2)


class IntegerConv3d(IntegerLayer):
    """A Conv3d: x [B, C, D, H, W]. The input is quantized once; its frames meet the weights of each depth in turn."""

    def convolve(self, x: Tensor, activation: Activation | None) -> Tensor:
        x = x if activation is None else activation(x)
        self.check(x, 5)
        kernel, stride, dilation = (of[0] for of in (self.layer.kernel_size, self.layer.stride, self.layer.dilation))
        if self.layer.padding_mode == "zeros":  # in depth; the code of 0 is the zero point
            x = functional.pad(x, (0, 0, 0, 0, *self.layer._reversed_padding_repeated_twice[4:]))
        batch, depth = len(x), x.shape[2]
        out = (depth - (kernel - 1) * dilation - 1) // stride + 1
        if out < 1:
            raise ModelError(f"The layer {self.record.name} takes more than {depth} frames; pass more.")
        frames = x.transpose(1, 2).flatten(0, 1)
        sums: Tensor | None = None
        for part in self.parts:
            interval = self.step.interval(part.quantizer.name, x[:, slice(*part.channels)].flatten(1))
            grid = Grid(part.channels, part.pitch, part.quantizer.bits, self.geometry.padding)
            codes = self.quantize(frames, grid, *interval.repeated(depth))
            codes = codes.permute(0, 2, 3, 1).unflatten(0, (batch, depth))
            for place, products in enumerate(part.products):
                first = place * dilation
                chosen = codes[:, first : first + (out - 1) * stride + 1 : stride].flatten(0, 1).permute(0, 3, 1, 2)
                chosen = chosen.contiguous(memory_format=torch.channels_last)
                sums = products(chosen, interval.repeated(out), sums)
        assert sums is not None
        return sums.reshape(batch, out, *sums.shape[1:]).transpose(1, 2)


class TransposedLayer(CodedLayer):
    """A transposed convolution on codes, by torch in floating point that represents their sums exactly.

    codes, less their zero points, and scales are those of each channel range.
    """

    def __init__(
        self,
        layer: nn.Module,
        record: LayerRecord,
        codes: Sequence[Tensor],
        scales: Sequence[Tensor],
        bias: Tensor | None,
        step: Step,
    ) -> None:
        super().__init__(layer, scales[0], bias)
        self.record, self.codes, self.scales, self.step = record, tuple(codes), tuple(scales), step
        self.exact = exact_dtype(*codes)

    @property
    def nbytes(self) -> int:
        """Bytes of its weights in memory."""
        return sum(part.nbytes for part in (*self.codes, *self.scales))

    def forward(self, input: Tensor) -> Tensor:
        x = input
        channel = (1, -1, *(1,) * (x.ndim - 2))
        ranges = zip(self.record.inputs, self.codes, self.scales, self.record.ranges, strict=True)
        y: Tensor | float = 0.0 if self.bias is None else self.bias.view(channel)
        for quantizer, codes, scale, channels in ranges:
            part = x[:, slice(*channels)]
            coded, own = levels(part, *self.step.interval(quantizer.name, part.flatten(1)), quantizer.bits)
            y = y + self.operation(coded.to(self.exact), codes.to(self.exact), None).float() * (
                own * scale.view(channel)
            )
        assert isinstance(y, Tensor)
        return y


FORMS: dict[str, type[IntegerLayer]] = {
    "linear": IntegerLinear,
    "conv1d": IntegerConv1d,
    "conv2d": IntegerLayer,
    "conv3d": IntegerConv3d,
}
