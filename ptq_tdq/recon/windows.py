"""Rows of a layer's input: what its weight is multiplied with at one place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ptq_tdq.modules.layers import find_kind, weight_groups


def positions(layer: nn.Module, x: Tensor) -> torch.Size:
    """How many places of every sample in an input like ``x`` [B, ...] the weight is multiplied with, by dimension."""
    if isinstance(layer, nn.Linear):
        return torch.Size([x.shape[1:-1].numel()])
    return _windows(layer, x[:1]).shape[2 : x.ndim]


def picker(layer: nn.Module, x: Tensor, each: int, generator: torch.Generator) -> Callable[[Tensor], Tensor]:
    """A function from inputs like ``x`` [B, ...] to [n, groups, K] at ``each`` random positions of every sample."""
    sizes = positions(layer, x)
    index = torch.randperm(sizes.numel(), generator=generator)[:each]
    if isinstance(layer, nn.Linear):
        return lambda value: value.reshape(len(value), sizes[0], -1)[:, index].flatten(0, 1)[:, None]
    where: tuple[slice | Tensor, ...] = (slice(None), slice(None), *torch.unravel_index(index, sizes))

    def pick(value: Tensor) -> Tensor:
        picked = _windows(layer, value)[where].transpose(1, 2)  # [B, n, C, *kernel]
        rows: Tensor = picked.unflatten(2, (weight_groups(layer), -1)).flatten(3).flatten(0, 1)
        return rows

    return pick


def _windows(layer: Any, x: Tensor) -> Tensor:
    """The windows of a convolution as [B, C, *positions, *kernel], those of its weight [O, C / groups, *kernel]."""
    kind = find_kind(layer)
    transposed = kind is not None and kind.transposed
    if transposed:
        x = _stuffed(layer, x)
    else:
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = functional.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    steps = (1,) * len(layer.stride) if transposed else layer.stride
    for i, (size, step, gap) in enumerate(zip(layer.kernel_size, steps, layer.dilation, strict=True)):
        x = x.unfold(2 + i, gap * (size - 1) + 1, step)[..., ::gap]
    return x.flip(tuple(range(-len(steps), 0))) if transposed else x


def _stuffed(layer: Any, x: Tensor) -> Tensor:
    """The input of which a transposed convolution is an ordinary one, with its kernel mirrored: zeros in between."""
    sizes = [(n - 1) * step + 1 for n, step in zip(x.shape[2:], layer.stride, strict=True)]
    wide = x.new_zeros(*x.shape[:2], *sizes)
    every: Any = (..., *(slice(None, None, step) for step in layer.stride))
    wide[every] = x
    pads: list[int] = []
    for size, gap, padding, more in zip(
        layer.kernel_size, layer.dilation, layer.padding, layer.output_padding, strict=True
    ):
        edge = gap * (size - 1) - padding
        pads = [edge, edge + more, *pads]  # the last dimension comes first
    return functional.pad(wide, pads)
