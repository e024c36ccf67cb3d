"""A layer by one call of ``native.c``: with few pixels, Python between its passes takes longer than they do."""

from __future__ import annotations

import ctypes
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from ptq_tdq.native.address import address, per_sample, untraced
from ptq_tdq.runtime.kernels import Before, Grid
from ptq_tdq.runtime.native import Frame, frame_of
from ptq_tdq.runtime.products import Convolution, NativeProducts, check_sum
from ptq_tdq.runtime.step import Interval


class _Layer(ctypes.Structure):
    """``Layer`` of native.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "bias", "gain")),
        *((name, ctypes.c_int64) for name in ("groups", "codes")),
        ("epsilon", ctypes.c_float),
    ]


class NativeCall(NamedTuple):
    """The addresses that C is given for inputs of one shape, the shape of the result, and what has to live as long."""

    addresses: tuple[int, int, int]
    shape: tuple[int, int, int, int]
    alive: tuple[_Layer, Frame, Convolution, Before, Tensor | None]


class NativeLayer:
    """A range of a layer's channels: what is done before codes, codes and products; ``grid`` is that for ``up`` = 1."""

    def __init__(self, library: ctypes.CDLL, grid: Grid, products: NativeProducts) -> None:
        self.library, self._function, self._grid, self._products = library, library.layer, grid, products
        self._function.argtypes, self._function.restype = [ctypes.c_void_p] * 9, ctypes.c_int
        self._calls: dict[tuple[object, ...], NativeCall] = {}

    def __deepcopy__(self, memo: dict[int, object]) -> NativeLayer:
        """Itself: nothing in it ever changes."""
        return self

    @untraced
    def __call__(self, x: Tensor, before: Before, interval: Interval, onto: Tensor | None, up: int) -> Tensor:
        """x [B, C, H, W] -> [B, O, H', W'], added to ``onto``, whose memory it takes.

        Raises :class:`RuntimeUnsupportedError` for tensors that do not fit each other.
        """
        x = x.float().contiguous(memory_format=torch.channels_last)
        *found, each = per_sample("a quantizer", interval.scale, interval.zero_point, x.shape[0])
        batch, channels, height, width = x.shape
        call = self.call_of(batch, channels, height, width, each, up, before)
        shift = None if before.shift is None else before.shift.float().contiguous()
        moved = None if shift is None else address("a shift", shift, torch.float32, x.shape[:2])
        if onto is None:
            out, there = torch.empty(call.shape, dtype=torch.float32, memory_format=torch.channels_last), None
        else:
            check_sum(onto, call.shape)
            out = onto.contiguous(memory_format=torch.channels_last)
            there = out.data_ptr()
        values = address("x", x, torch.float32, x.shape, torch.channels_last)
        if self._function(*call.addresses, values, moved, *found, there, out.data_ptr()):
            raise MemoryError
        return out

    @untraced
    def of_tokens(self, x: Tensor, before: Before, interval: Interval) -> Tensor:
        """x [B, ..., C] -> [B, ..., O]."""
        x = x.float().contiguous()
        *found, each = per_sample("a quantizer", interval.scale, interval.zero_point, x.shape[0])
        samples, channels = x.shape[0] if each else 1, x.shape[-1]
        call = self.call_of(samples, channels, x.numel() // (samples * channels), 1, each, 1, before)
        out = torch.empty(*x.shape[:-1], call.shape[1], dtype=torch.float32)
        if self._function(*call.addresses, address("x", x, torch.float32, x.shape), None, *found, None, out.data_ptr()):
            raise MemoryError
        return out

    def call_of(
        self, batch: int, channels: int, height: int, width: int, each: bool, up: int, before: Before
    ) -> NativeCall:
        """The call for x [B, C, H, W]; described once."""
        done = id(before.norm), id(before.gain), before.rotate is None
        key = batch, channels, height, width, each, up, before.activation, *done
        found = self._calls.get(key)
        if found is None:
            found = self._calls[key] = self._described(batch, channels, height, width, each, up, before)
        return found

    def _described(
        self, batch: int, channels: int, height: int, width: int, each: bool, up: int, before: Before
    ) -> NativeCall:
        grid, norm = self._grid._replace(up=up), before.norm
        grid.check(channels, before)
        frame, signs = frame_of(
            batch, channels, height, width, grid, each, before.activation, before.rotate is not None
        )
        top, left, bottom, right = grid.padding
        padded = top + height * up + bottom, left + width * up + right
        shape = self._products.shape((batch, grid.pitch, *padded))
        (convolution,) = self._products.described(batch, *padded, int(each))
        layer = _Layer(codes=prod((batch, grid.pitch, *padded)))
        if norm is not None:
            layer.weight = address("the weight of a norm", norm.weight, torch.float32, (channels,))
            layer.bias = address("the bias of a norm", norm.bias, torch.float32, (channels,))
            layer.groups, layer.epsilon = norm.groups, norm.epsilon
        elif before.gain is not None:
            own = (before.channels(channels),)
            layer.gain = address("gains of channels", before.gain, torch.float32, own) + 4 * grid.channels[0]
        alive = layer, frame, convolution
        addresses = ctypes.addressof(layer), ctypes.addressof(frame), ctypes.addressof(convolution)
        return NativeCall(addresses, shape, (*alive, before._replace(shift=None), signs))
