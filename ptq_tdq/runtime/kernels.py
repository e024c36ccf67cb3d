"""The passes around the integer products, in torch: the reference that ``native.c`` is compared with.

Layout: activations are float32 [B, C, H, W] in channels_last memory, codes uint8 alike (the layout oneDNN computes in).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from ptq_tdq.affine import quantize
from ptq_tdq.errors import RuntimeUnsupportedError
from ptq_tdq.scheme import QType


@dataclass(frozen=True)
class Norm:
    """A group norm (weight and bias [C]) before a quantizer, with SiLU after it or not."""

    groups: int
    weight: Tensor
    bias: Tensor
    epsilon: float
    silu: bool


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

    def check(self, channels: int, norm: Norm | None) -> None:
        """Raise :class:`RuntimeUnsupportedError` unless the grid (and the norm) fit an x of so many channels."""
        lo, hi = self.channels
        inside = 0 <= lo < hi <= channels and self.pitch >= hi - lo
        whole = norm is None or ((lo, hi) == (0, channels) and norm.groups > 0 and channels % norm.groups == 0)
        if not (inside and whole and min(self.padding) >= 0 and self.up >= 1):
            groups = "" if norm is None else f" behind a norm of {norm.groups} groups"
            raise RuntimeUnsupportedError(f"The integer kernels cannot quantize {channels} channels by {self}{groups}.")


Rotate = Callable[[Tensor], Tensor]  # of the channels of x [..., C]; see :func:`ptq_tdq.rotate.rotated`


class Quantize(Protocol):
    """x [B, C, H, W] -> codes uint8 [B, pitch, top + up H + bottom, left + up W + right], channels_last.

    ``scale`` float32 and ``zero_point`` int32 are [B] or, for all samples alike, [1]. With a ``norm`` (which covers all
    C channels) x + ``shift`` ([B, C] or None) is normalized first; without one, each channel may have a ``gain`` [C].
    """

    def __call__(
        self,
        x: Tensor,
        grid: Grid,
        scale: Tensor,
        zero_point: Tensor,
        norm: Norm | None,
        shift: Tensor | None,
        gain: Tensor | None = None,
    ) -> Tensor: ...


def levels(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes of x [B, ...] less zero points, as float32, and the scale [1 or B, 1, ...], of tokens [B, ..., 1]."""
    shape = (*scale.shape, *(1,) * (x.ndim - scale.ndim))
    scale, zero_point = scale.view(shape), zero_point.view(shape)
    return torch.clamp((x.float() / scale).round_(), -zero_point, QType(bits).qmax - zero_point), scale


def normalized(x: Tensor, norm: Norm, shift: Tensor | None) -> Tensor:
    """Group norm of ``x + shift``, then SiLU where the norm has it."""
    x = x if shift is None else x + shift[:, :, None, None]
    x = functional.group_norm(x, norm.groups, norm.weight, norm.bias, norm.epsilon)
    return functional.silu(x) if norm.silu else x


def reference_quantize(
    x: Tensor,
    grid: Grid,
    scale: Tensor,
    zero_point: Tensor,
    norm: Norm | None,
    shift: Tensor | None,
    gain: Tensor | None = None,
) -> Tensor:
    """:class:`Quantize` in torch operations."""
    grid.check(x.shape[1], norm)
    x = x if gain is None else x * gain.view(1, -1, 1, 1)
    x = (x if norm is None else normalized(x, norm, shift))[:, slice(*grid.channels)]
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
