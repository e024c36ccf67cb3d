"""Calls ``native.c``; where it cannot be built, kernels.py does the work."""

from __future__ import annotations

import ctypes
from functools import lru_cache

import torch
from torch import Tensor

from ptq_tdq.native.address import address, per_sample, untraced
from ptq_tdq.native.library import load_c
from ptq_tdq.rotate import signs
from ptq_tdq.runtime.kernels import (
    ACTIVATIONS,
    NOTHING,
    Activation,
    Before,
    Grid,
    Quantize,
    Rotate,
    WeightOnly,
    reference_weight_only,
)
from ptq_tdq.scheme import QType

FEW_ROWS = 8  # for which weights of integers are made float one by one


class Frame(ctypes.Structure):
    """``Frame`` of native.c."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "height", "width", "channels", "stride", "first", "pitch")),
        *((name, ctypes.c_int64) for name in ("top", "left", "bottom", "right", "up", "each")),
        *((name, ctypes.c_int64) for name in ("activation", "is_gated")),
        ("signs", ctypes.c_void_p),
        ("qmax", ctypes.c_float),
    ]


def open_library(march: str = "native") -> ctypes.CDLL | str:
    """The library built for a processor as compilers name it, or a clause that says why there is none."""
    return load_c("ptq_tdq.runtime", "native.c", march)


def native_quantize(library: ctypes.CDLL) -> Quantize:
    """:class:`~ptq_tdq.runtime.kernels.Quantize` on the built library."""
    frames: dict[tuple[object, ...], tuple[Frame, Tensor | None]] = {}
    plain, fused = library.quantize, library.norm_quantize
    plain.restype = fused.restype = ctypes.c_int
    plain.argtypes = [ctypes.c_void_p] * 6
    fused.argtypes = [*[ctypes.c_void_p] * 5, ctypes.c_int64, ctypes.c_float, *[ctypes.c_void_p] * 3]

    @untraced
    def quantize(x: Tensor, grid: Grid, scale: Tensor, zero_point: Tensor, before: Before = NOTHING) -> Tensor:
        if x.dtype != torch.float32 or not x.is_contiguous(memory_format=torch.channels_last):
            x = x.float().contiguous(memory_format=torch.channels_last)
        batch, stride, height, width = x.shape
        lo, (top, left, bottom, right), up = grid.channels[0], grid.padding, grid.up
        grid.check(stride, before)
        *interval, each = per_sample("a quantizer", scale, zero_point, batch)
        key = (batch, stride, height, width, grid, each, before.activation, before.rotate is not None)
        found = frames.get(key)
        if found is None:
            found = frames[key] = frame_of(*key)
        frame = ctypes.addressof(found[0])
        shape = (batch, grid.pitch, top + height * up + bottom, left + width * up + right)
        out = torch.empty(shape, dtype=torch.uint8, memory_format=torch.channels_last)
        values = address("x", x, torch.float32, x.shape, torch.channels_last)
        norm, shift, gain = before.norm, before.shift, before.gain
        if norm is None:
            own = (before.channels(stride),)
            gains = None if gain is None else address("gains of channels", gain, torch.float32, own) + 4 * lo
            failed = plain(frame, values, gains, *interval, out.data_ptr())
        else:
            shift = None if shift is None else shift.float().contiguous()
            moved = None if shift is None else address("a shift", shift, torch.float32, (batch, stride))
            affine = (
                address("the weight of a norm", norm.weight, torch.float32, (stride,)),
                address("the bias of a norm", norm.bias, torch.float32, (stride,)),
            )
            failed = fused(frame, values, moved, *affine, norm.groups, norm.epsilon, *interval, out.data_ptr())
        if failed:
            raise MemoryError
        return out

    return quantize


def frame_of(
    batch: int,
    stride: int,
    height: int,
    width: int,
    grid: Grid,
    each: bool,
    activation: Activation | None,
    rotated: bool,
) -> tuple[Frame, Tensor | None]:
    """What C is given, and a tensor that has to live as long."""
    lo, hi = grid.channels
    if height == 1 and grid.up == 1 and not any(grid.padding):  # threads share rows
        height, width = width, 1
    sizes = batch, height, width, hi - lo, stride, lo, grid.pitch, *grid.padding, grid.up, each
    kind = (0, 0) if activation is None else (1 + list(ACTIVATIONS).index(activation.name), activation.gated)
    flips = signs(hi) if rotated else None
    where = None if flips is None else address("signs", flips, torch.float32, (hi,))
    return Frame(*sizes, *kind, where, QType(grid.bits).qmax), flips


def native_rotate(library: ctypes.CDLL) -> Rotate:
    """:func:`ptq_tdq.rotate.rotated` on the built library."""
    function = library.rotate
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p]
    function.restype = None
    flips_of = lru_cache(signs)

    @untraced
    def rotate(x: Tensor) -> Tensor:
        x = x.float().contiguous()
        out = torch.empty_like(x)
        channels = x.shape[-1]
        values = address("x", x, torch.float32, x.shape)
        flips = address("signs", flips_of(channels), torch.float32, (channels,))
        function(values, flips, x.numel() // max(1, channels), channels, out.data_ptr())
        return out

    return rotate


def native_weight_only(library: ctypes.CDLL) -> WeightOnly:
    """:data:`~ptq_tdq.runtime.kernels.WeightOnly` on the built library, for few rows; torch takes the others."""
    function = library.weight_only
    function.argtypes = [*[ctypes.c_void_p] * 4, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    function.restype = None

    @untraced
    def linear(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        outputs, channels = codes.shape
        rows = x.numel() // max(1, channels)
        if rows > FEW_ROWS or codes.dtype != torch.int8 or x.shape[-1] != channels:
            return reference_weight_only(x, codes, scale, bias)
        x = x.contiguous()
        out = torch.empty(*x.shape[:-1], outputs, dtype=torch.float32)
        function(
            address("x", x, torch.float32, x.shape),
            address("weights", codes, torch.int8, codes.shape),
            address("the scales of weights", scale, torch.float32, (outputs,)),
            None if bias is None else address("a bias", bias, torch.float32, (outputs,)),
            rows,
            channels,
            outputs,
            out.data_ptr(),
        )
        return out

    return linear
