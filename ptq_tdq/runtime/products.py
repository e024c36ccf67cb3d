"""Convolutions of codes: u8 activations x s8 weights with exact sums, by our kernel, by oneDNN or in floating point.

    y = s w_s (sum (q - z) w) + bias        w: signed weight codes, w_s: their scale for each output channel

The input is padded with the code z, so that no place of the image is an exception and the zero point is settled by
``z sum(w)``. A Linear is a convolution of one pixel.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from ptq_tdq.errors import RuntimeUnsupportedError
from ptq_tdq.native.address import address, per_sample, untraced
from ptq_tdq.runtime.step import Interval

CHANNELS = 4  # the kernel takes multiples of so many
NIBBLE_BITS = 4  # weights of at most so many bits share a byte in memory
LARGEST_CODE = 255
LARGEST_FLOAT32_INTEGER = 2**24  # up to which float32 has them all


@dataclass(frozen=True)
class Geometry:
    """What a convolution does beside its weights; ``padding`` is (top, left, bottom, right)."""

    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @classmethod
    def of(cls, layer: Any) -> Geometry:
        """The geometry of a Linear, a Conv1d (an image of one row), a Conv2d, or of a Conv3d's frames.

        Padding other than with zeros is no part of it: such a layer pads its input itself.
        """
        if not hasattr(layer, "kernel_size"):
            return cls()
        kernel, stride, dilation = (
            ((1, *of) if len(of) == 1 else of[-2:]) for of in (layer.kernel_size, layer.stride, layer.dilation)
        )
        left, right, top, bottom = [*layer._reversed_padding_repeated_twice, 0, 0][:4]
        padding = (top, left, bottom, right) if layer.padding_mode == "zeros" else (0, 0, 0, 0)
        return cls(kernel, stride, padding, dilation, layer.groups)

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Output pixels for a padded input."""
        sizes = zip((height, width), self.kernel, self.stride, self.dilation, strict=True)
        out_height, out_width = ((n - (k - 1) * d - 1) // s + 1 for n, k, s, d in sizes)
        return out_height, out_width

    def shape(self, codes: Sequence[int], weights: Sequence[int]) -> tuple[int, int, int, int]:
        """That of the products of padded codes [B, C, H, W] with weights [O, C, kh, kw].

        Raises :class:`RuntimeUnsupportedError` for an image that is smaller than the kernel.
        """
        batch, _, height, width = codes
        size = self.size(height, width)
        if min(size) < 1:
            raise RuntimeUnsupportedError(
                f"A padded image of {height} x {width} pixels is too small for the kernel {self.kernel}; pass a larger."
            )
        return batch, weights[0], *size


@dataclass(frozen=True)
class Weights:
    """Codes uint8 [O, C, kh, kw] of ``bits`` bits, scale and bias float32 [O], zero_point int32 [O].

    Raises :class:`RuntimeUnsupportedError` for tensors of another form.
    """

    codes: Tensor
    bits: int
    scale: Tensor
    zero_point: Tensor
    bias: Tensor

    def __post_init__(self) -> None:
        codes, outputs = self.codes, self.codes.shape[:1]
        rows = (self.scale, torch.float32), (self.zero_point, torch.int32), (self.bias, torch.float32)
        fit = all(x.dtype == dtype and x.shape == outputs and x.device.type == "cpu" for x, dtype in rows)
        if not (
            fit and codes.dtype == torch.uint8 and codes.ndim == 4 and codes.numel() and codes.device.type == "cpu"
        ):
            found = ", ".join(f"{x.dtype} {list(x.shape)}" for x in (codes, *(x for x, _ in rows)))
            raise RuntimeUnsupportedError(f"These tensors are no weights of the integer kernels: {found}.")

    def padded(self) -> Weights:
        """The same with channels up to a multiple of 4, whose weights are 0."""
        beyond = self.zero_point.to(torch.uint8).view(-1, 1, 1, 1)
        beyond = beyond.expand(-1, -self.codes.shape[1] % CHANNELS, *self.codes.shape[2:])
        return replace(self, codes=torch.cat([self.codes, beyond], 1))

    @property
    def signed(self) -> Tensor:
        """Codes less their zero points, int16."""
        return _signed(self.codes, self.zero_point)

    def summands(self) -> list[Tensor]:
        """The signed codes as s8, or as the sum of such tensors where they do not fit."""
        parts: list[Tensor] = []
        rest = self.signed
        while not parts or bool(rest.any()):
            parts.append(rest.clamp(-128, 127).to(torch.int8))
            rest = rest - parts[-1]
        return parts


def _signed(codes: Tensor, zero_point: Tensor) -> Tensor:
    return codes.to(torch.int16) - zero_point.to(torch.int16).view(-1, *(1,) * (codes.ndim - 1))


def narrow(codes: Tensor, zero_point: Tensor) -> Tensor:
    """Codes [O, ...] less their zero points [O], as int8 where they fit."""
    signed = _signed(codes, zero_point)
    return signed.to(torch.int8) if int(signed.min()) >= -128 and int(signed.max()) <= 127 else signed


def exact_dtype(*codes: Tensor) -> torch.dtype:
    """The type of floating point that has all sums of products with signed weight codes [O, ...]."""
    largest = LARGEST_CODE * max(int(part.int().abs().flatten(1).sum(1).max()) for part in codes)
    return torch.float32 if largest <= LARGEST_FLOAT32_INTEGER else torch.float64


class Products(Protocol):
    """Padded codes uint8 [B, C, H, W] (channels_last) -> float32 [B, O, H', W'].

    The result is added to ``onto``, whose memory it may take. ``nbytes`` is what the weights take in memory, ``name``
    says what computes.
    """

    nbytes: int
    name: str

    def __call__(self, codes: Tensor, interval: Interval, onto: Tensor | None) -> Tensor: ...


class OneDnnProducts:
    """By ``torch.ops.onednn``: any geometry, but exact with AVX512-VNNI or AMX alone.

    Without them it adds pairs of products in 16 bits, and saturates silently.
    """

    name = "oneDNN"

    def __init__(self, weights: Weights, geometry: Geometry) -> None:
        g = geometry
        self._geometry, self._shape = geometry, weights.codes.shape
        self._scale, self._bias, self._one = weights.scale, weights.bias, torch.ones_like(weights.scale)
        self._weight_sum = weights.signed.flatten(1).sum(1).float()
        self._no_zero = torch.zeros(len(weights.scale), dtype=torch.int32)
        shape = list(g.stride), [0, 0], list(g.dilation), g.groups
        self._where = (*shape, 1.0, 0, torch.float32)
        pack = torch.ops.onednn.qconv_prepack
        self._packed = [pack(w, weights.scale, 1.0, 0, *shape, None) for w in weights.summands()]
        self.nbytes = len(self._packed) * weights.codes.numel() + 4 * weights.scale.nbytes

    def __call__(self, codes: Tensor, interval: Interval, onto: Tensor | None) -> Tensor:
        check_codes(codes, interval, onto, self._shape, self._geometry)
        if not interval.each:
            scale, zero_point = float(interval.scale), int(interval.zero_point)
            return self._sum(codes, scale, zero_point, self._scale, self._bias, onto)
        each = (-1, 1, 1, 1)
        sums = self._sum(codes, 1.0, 0, self._one, None, None)  # of codes, still without a zero point
        sums -= interval.zero_point.view(each) * self._weight_sum.view(1, -1, 1, 1)
        y = sums * interval.scale.view(each) * self._scale.view(1, -1, 1, 1) + self._bias.view(1, -1, 1, 1)
        return y if onto is None else y + onto

    def _sum(
        self, codes: Tensor, scale: float, zero_point: int, weight_scale: Tensor, bias: Tensor | None, y: Tensor | None
    ) -> Tensor:
        convolution = torch.ops.onednn.qconv2d_pointwise
        for packed in self._packed:
            given = codes, scale, zero_point, packed, weight_scale, self._no_zero
            if y is None:
                y = convolution(*given, bias, *self._where, "none", [], "")
            else:
                y = y.contiguous(memory_format=torch.channels_last)
                y = convolution.binary(*given, y, bias, *self._where, 1.0, 0, "sum", 1.0, None, [], None)
            bias = None
        assert y is not None
        return y


class FloatProducts:
    """By ``torch``, in floating point that represents the sums exactly: any processor, any geometry."""

    name = "torch, in floating point"

    def __init__(self, weights: Weights, geometry: Geometry) -> None:
        self._geometry, self._scale, self._bias = geometry, weights.scale, weights.bias
        self._codes = narrow(weights.codes, weights.zero_point)
        self._dtype = exact_dtype(self._codes)
        self.nbytes = self._codes.nbytes + weights.scale.nbytes + weights.bias.nbytes

    def __call__(self, codes: Tensor, interval: Interval, onto: Tensor | None) -> Tensor:
        check_codes(codes, interval, onto, self._codes.shape, self._geometry)
        each, channel, g = (-1, 1, 1, 1), (1, -1, 1, 1), self._geometry
        levels = codes.to(self._dtype) - interval.zero_point.view(each)
        sums = functional.conv2d(levels, self._codes.to(self._dtype), None, g.stride, 0, g.dilation, g.groups)
        y = sums.float() * (interval.scale.view(each) * self._scale.view(channel)) + self._bias.view(channel)
        return y if onto is None else y + onto


class Convolution(ctypes.Structure):
    """``Convolution`` of native.c."""

    _sizes_ = (
        *("batch", "in_height", "in_width", "channels", "out_height", "out_width", "outputs"),
        *("kernel_height", "kernel_width", "stride_height", "stride_width", "dilation_height", "dilation_width"),
        *("nibbles", "each"),
    )
    _tensors_ = ("weights", "weight_zero", "weight_sum", "weight_scale", "bias")
    _fields_ = [*((name, ctypes.c_int64) for name in _sizes_), *((name, ctypes.c_void_p) for name in _tensors_)]


class NativeProducts:
    """By ``native.c``: weights of 4 bits stay two to a byte in memory; no groups, channels a multiple of 4."""

    def __init__(self, weights: Weights, geometry: Geometry, library: ctypes.CDLL) -> None:
        self._geometry, self._shape, self._convolve = geometry, weights.codes.shape, library.convolve
        self._convolve.argtypes, self._convolve.restype = [ctypes.c_void_p] * 6, ctypes.c_int
        self.name = f"native C, {_instructions(library)}"
        self._nibbles = int(weights.bits <= NIBBLE_BITS)
        zero = weights.zero_point if self._nibbles else torch.zeros_like(weights.zero_point)
        signed = [weights.signed] if self._nibbles else weights.summands()
        stored = [weights.codes] if self._nibbles else signed
        bias = [weights.bias, *[torch.zeros_like(weights.bias)] * (len(stored) - 1)]
        block, group = _layout(library, self._nibbles)
        self._tensors = [
            (
                _in_blocks(w, block, group, pairs=bool(self._nibbles)),
                _padded(zero.to(torch.int8), block),
                _padded(s.flatten(1).sum(1, dtype=torch.int32), block),
                _padded(weights.scale, block),
                _padded(b, block),
            )
            for w, s, b in zip(stored, signed, bias, strict=True)
        ]
        self.nbytes = sum(x.nbytes for tensors in self._tensors for x in tensors)
        self.single = len(self._tensors) == 1
        self._calls: dict[tuple[int, ...], list[Convolution]] = {}

    def __deepcopy__(self, memo: dict[int, object]) -> NativeProducts:
        """Itself: nothing in it ever changes."""
        return self

    @staticmethod
    def covers(weights: Weights, geometry: Geometry) -> bool:
        return geometry.groups == 1 and weights.codes.shape[1] % CHANNELS == 0

    @untraced
    def __call__(self, codes: Tensor, interval: Interval, onto: Tensor | None) -> Tensor:
        shape = check_codes(codes, interval, onto, self._shape, self._geometry)
        batch, _, height, width = codes.shape
        if onto is None:
            out = torch.empty(shape, dtype=torch.float32, memory_format=torch.channels_last)
        else:
            out = onto = onto.contiguous(memory_format=torch.channels_last)
        where = codes.data_ptr(), interval.scale.data_ptr(), interval.zero_point.data_ptr()
        for call in self.described(batch, height, width, int(interval.each)):
            there = None if onto is None else out.data_ptr()
            if self._convolve(ctypes.addressof(call), *where, there, out.data_ptr()):
                raise MemoryError
            onto = out
        return out

    def shape(self, codes: Sequence[int]) -> tuple[int, int, int, int]:
        """That of the products of codes of this shape."""
        return self._geometry.shape(codes, self._shape)

    def described(self, batch: int, height: int, width: int, each: int) -> list[Convolution]:
        """What C needs to know of the products of padded codes of these sizes: they add up."""
        if height == width == 1 and self._geometry.stride == (1, 1):  # one image of all pixels: several at a time
            batch, width, each = 1, batch, 2 * each
        calls = self._calls.get((batch, height, width, each))
        if calls is None:
            g, (outputs, channels, *_) = self._geometry, self._shape
            sizes = batch, height, width, channels, *g.size(height, width), outputs
            steps = *g.kernel, *g.stride, *g.dilation, self._nibbles, each
            calls = self._calls[batch, height, width, each] = [
                Convolution(*sizes, *steps, *(x.data_ptr() for x in tensors)) for tensors in self._tensors
            ]
        return calls


def check_codes(
    codes: Tensor, interval: Interval, onto: Tensor | None, weights: Sequence[int], geometry: Geometry
) -> tuple[int, int, int, int]:
    """The shape of the products of ``codes`` with weights of the shape [O, C, kh, kw].

    Raises :class:`RuntimeUnsupportedError` for codes, an interval or an ``onto`` that the kernels would misread.
    """
    shape = geometry.shape(codes.shape, weights)
    channels = weights[1] * geometry.groups
    address("codes", codes, torch.uint8, (len(codes), channels, *codes.shape[2:]), torch.channels_last)
    per_sample("codes", interval.scale, interval.zero_point, len(codes))
    if onto is not None:
        check_sum(onto, shape)
    return shape


def check_sum(onto: Tensor, shape: Sequence[int]) -> None:
    """Raise :class:`RuntimeUnsupportedError` unless products of this shape can be added to ``onto``."""
    if onto.dtype != torch.float32 or onto.shape != tuple(shape) or not onto.is_cpu:
        raise RuntimeUnsupportedError(
            f"Products of the shape {list(shape)} cannot be added to {onto.dtype} {list(onto.shape)} on {onto.device}."
        )


def _instructions(library: ctypes.CDLL) -> str:
    library.instructions.restype = ctypes.c_char_p
    name: bytes = library.instructions()
    return name.decode()


def _layout(library: ctypes.CDLL, nibbles: int) -> tuple[int, int]:
    """Outputs in a block of weights and channels in a group of them, as this processor's kernel takes them."""
    library.block_outputs.restype = library.group_channels.restype = ctypes.c_int64
    library.group_channels.argtypes = [ctypes.c_int64]
    return library.block_outputs(), library.group_channels(nibbles)


def _padded(values: Tensor, block: int) -> Tensor:
    """Values [O], with zeros up to a multiple of the block."""
    return functional.pad(values, (0, -len(values) % block)).contiguous()


def _in_blocks(codes: Tensor, block: int, group: int, *, pairs: bool) -> Tensor:
    """[O, C, kh, kw] in the order of native.c; with ``pairs`` two unsigned codes of 4 bits to a byte."""
    codes = functional.pad(codes, (0, 0, 0, 0, 0, 0, 0, -len(codes) % block))
    rows = codes.permute(0, 2, 3, 1).reshape(len(codes) // block, block, -1, group)
    blocks = rows.permute(0, 2, 1, 3).contiguous()
    if not pairs:
        return blocks
    low, high = blocks.reshape(-1, 2).unbind(1)
    return low | (high << NIBBLE_BITS)
