"""A linear layer by one call of ``native.c``: with few tokens, Python between its passes takes longer than they do."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ptq_tdq.runtime.address import address, per_sample
from ptq_tdq.runtime.kernels import Activation, Before, Grid
from ptq_tdq.runtime.native import frame_of
from ptq_tdq.runtime.products import NativeProducts
from ptq_tdq.runtime.step import Interval


class NativeLinear:
    """Tokens x [B, ..., C] -> [B, ..., O], in float32: what is done ``before`` their codes, codes and products."""

    def __init__(self, library: ctypes.CDLL, grid: Grid, before: Before, products: NativeProducts) -> None:
        self._function, self._grid, self._before, self._products = library.linear, grid, before, products
        self._function.argtypes, self._function.restype = [ctypes.c_void_p] * 7, ctypes.c_int
        channels, gain = grid.channels[1], before.gain
        self._gain = None if gain is None else address("gains of channels", gain, torch.float32, (channels,))
        self._calls: dict[tuple[object, ...], tuple[int, int, object]] = {}

    def __deepcopy__(self, memo: dict[int, object]) -> NativeLinear:
        """Itself: nothing in it ever changes."""
        return self

    def takes(self, x: Tensor, activation: Activation | None) -> bool:
        """Whether x has real numbers and as many channels as the layer, with those of a gate."""
        gates = 1 if activation is None else 1 + activation.gated
        return x.shape[-1] == gates * self._grid.channels[1] and not x.is_complex()

    def __call__(self, x: Tensor, interval: Interval, activation: Activation | None) -> Tensor:
        """Raises :class:`RuntimeUnsupportedError` for intervals of other samples."""
        x = x.float().contiguous()
        *found, each = per_sample("a quantizer", interval.scale, interval.zero_point, len(x))
        key = (len(x) if each else 1, x.numel(), x.shape[-1], each, activation)
        frame, convolution, _ = self._calls.get(key) or self._described(*key)
        out = torch.empty(*x.shape[:-1], self._products.outputs)
        values = address("x", x, torch.float32, x.shape)
        if self._function(frame, convolution, values, self._gain, *found, out.data_ptr()):
            raise MemoryError
        return out

    def _described(
        self, samples: int, numbers: int, channels: int, each: bool, activation: Activation | None
    ) -> tuple[int, int, object]:
        """What C is told, with what has to live as long."""
        before = self._before._replace(activation=activation)
        self._grid.check(channels, before)
        tokens = numbers // channels // samples
        frame = frame_of(samples, channels, tokens, 1, self._grid, each, activation, before.rotate is not None)
        (convolution,) = self._products.described(samples, tokens, 1, int(each))
        found = ctypes.addressof(frame[0]), ctypes.addressof(convolution), (frame, convolution)
        self._calls[samples, numbers, channels, each, activation] = found
        return found
