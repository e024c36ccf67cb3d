"""The passes around the integer products, in torch: the reference that ``native.c`` is compared with.

Layout: activations are float32 [B, C, H, W] in channels_last memory, codes uint8 alike (the layout oneDNN computes in).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from ptq_tdq.affine import quantize
from ptq_tdq.errors import RuntimeUnsupportedError
from ptq_tdq.scheme import QType

FLOAT_ROWS = 256  # of a weight that are made float at once: they stay in the cache
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {  # their order is that of native.c
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu-tanh": partial(functional.gelu, approximate="tanh"),
    "gelu-sigmoid": lambda x: x * torch.sigmoid(1.702 * x),
}


class Activation(NamedTuple):
    """One of :data:`ACTIVATIONS` before a quantizer; a ``gated`` one multiplies the first half of the channels.

    SwiGLU and GEGLU (arXiv 2002.05202) are gated: y = x[:C] f(x[C:]).
    """

    name: str
    gated: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        """Of x [B, C, ...], or [B, 2 C, ...] where it is gated."""
        if not self.gated:
            return ACTIVATIONS[self.name](x)
        values, gate = x.chunk(2, 1)
        return values * ACTIVATIONS[self.name](gate)


SILU = Activation("silu")


@dataclass(frozen=True)
class Norm:
    """A group norm (weight and bias [C]) before a quantizer."""

    groups: int
    weight: Tensor
    bias: Tensor
    epsilon: float


@dataclass(frozen=True)
class TokenNorm:
    """A layer norm of tokens or, where it is not ``centered``, an RMS norm; weight and bias [C], if it has them."""

    weight: Tensor | None
    bias: Tensor | None
    epsilon: float
    centered: bool = True


Rotate = Callable[[Tensor], Tensor]  # of the channels of x [..., C]; see :func:`ptq_tdq.rotate.rotated`


class Before(NamedTuple):
    """What is done to x [B, C, H, W] before its codes, in this order; ``shift`` is [B, C], ``gain`` [C]."""

    shift: Tensor | None = None
    norm: Norm | None = None
    activation: Activation | None = None
    rotate: Rotate | None = None
    gain: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """In torch operations."""
        x = x if self.norm is None else normalized(x, self.norm, self.shift)
        x = x if self.activation is None else self.activation(x)
        x = x if self.rotate is None else self.rotate(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return x if self.gain is None else x * self.gain.view(1, -1, 1, 1)

    def channels(self, given: int) -> int:
        """How many channels x has afterwards."""
        gated = self.activation is not None and self.activation.gated
        return given if not gated else given // 2 if given % 2 == 0 else 0


NOTHING = Before()


class Grid(NamedTuple):
    """Where codes go: the channel range [lo, hi) to take, bits, zero-point padding and nearest upsampling.

    ``pitch`` is the number of channels of the output, whose weights beyond the range are 0; ``padding`` is (top, left,
    bottom, right) in pixels of the upsampled image.
    """

    channels: tuple[int, int]
    pitch: int
    bits: int
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    up: int = 1

    def check(self, given: int, before: Before) -> None:
        """Raise :class:`RuntimeUnsupportedError` unless this and what is done before fit an x of so many channels."""
        (lo, hi), norm, left = self.channels, before.norm, before.channels(given)
        grouped = norm is None or (left == given and norm.groups > 0 and given % norm.groups == 0)
        mixed = norm is not None or before.activation is not None or before.rotate is not None
        inside = 0 <= lo < hi <= left and (not mixed or (lo, hi) == (0, left))
        if not (inside and grouped and self.pitch >= hi - lo and min(self.padding) >= 0 and self.up >= 1):
            groups = "" if norm is None else f" behind a norm of {norm.groups} groups"
            raise RuntimeUnsupportedError(f"The integer kernels cannot quantize {given} channels by {self}{groups}.")


WeightOnly = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""x float32 [..., C], codes [O, C], scale and bias [O] -> x codes^T scale + bias [..., O]."""


class Quantize(Protocol):
    """x [B, C, H, W] -> codes uint8 [B, pitch, top + up H + bottom, left + up W + right], channels_last.

    ``scale`` float32 and ``zero_point`` int32 are [B] or, for all samples alike, [1]. Where anything but a gain comes
    ``before``, all channels are taken; a norm and a gain do not come together.
    """

    def __call__(
        self, x: Tensor, grid: Grid, scale: Tensor, zero_point: Tensor, before: Before = NOTHING
    ) -> Tensor: ...


def levels(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes of x [B, ...] less zero points, as float32, and the scale [1 or B, 1, ...], of tokens [B, ..., 1]."""
    shape = (*scale.shape, *(1,) * (x.ndim - scale.ndim))
    scale, zero_point = scale.view(shape), zero_point.view(shape)
    return torch.clamp((x.float() / scale).round_(), -zero_point, QType(bits).qmax - zero_point), scale


def normalized(x: Tensor, norm: Norm, shift: Tensor | None) -> Tensor:
    """Group norm of ``x + shift``."""
    x = x if shift is None else x + shift[:, :, None, None]
    return functional.group_norm(x, norm.groups, norm.weight, norm.bias, norm.epsilon)


def reference_quantize(x: Tensor, grid: Grid, scale: Tensor, zero_point: Tensor, before: Before = NOTHING) -> Tensor:
    """:class:`Quantize` in torch operations."""
    grid.check(x.shape[1], before)
    x = before(x)[:, slice(*grid.channels)]
    each = (-1, 1, 1, 1)
    codes = quantize(x, scale.view(each), zero_point.view(each), QType(grid.bits)).to(torch.uint8)
    codes = codes.repeat_interleave(grid.up, 2).repeat_interleave(grid.up, 3)
    top, left, bottom, right = grid.padding
    batch, channels, height, width = codes.shape
    shape = (batch, grid.pitch, top + height + bottom, left + width + right)
    out = torch.empty(shape, dtype=torch.uint8, memory_format=torch.channels_last)
    out.copy_(zero_point.view(each).expand(shape))
    out[:, :channels, top : top + height, left : left + width] = codes
    out[:, channels:, top : top + height, left : left + width] = 0
    return out


def reference_weight_only(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """:data:`WeightOnly` in torch operations; only some rows of the codes are float at a time."""
    parts = [functional.linear(x, rows.to(torch.float32)) for rows in codes.split(FLOAT_ROWS)]
    y = (parts[0] if len(parts) == 1 else torch.cat(parts, -1)) * scale
    return y if bias is None else y + bias
