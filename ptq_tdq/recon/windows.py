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
    return _windows(layer, _wide(layer, x[:1])).shape[2 : x.ndim]


def picker(layer: nn.Module, x: Tensor, each: int, generator: torch.Generator) -> Callable[[Tensor], Tensor]:
    """A function from inputs like ``x`` [B, ...] to [n, groups, K] at ``each`` random positions of every sample."""
    sizes = positions(layer, x)
    index = torch.randperm(sizes.numel(), generator=generator)[:each]
    if isinstance(layer, nn.Linear):
        return lambda value: value.reshape(len(value), sizes[0], -1)[:, index].flatten(0, 1)[:, None]
    image = _wide(layer, x[:1, :1]).shape
    numbers = _windows(layer, torch.arange(image.numel()).view(image))[0, 0]  # of the places of an input
    taps = numbers[torch.unravel_index(index, sizes)].flatten(1).to(x.device)  # that each position reads, [n, taps]

    def pick(value: Tensor) -> Tensor:
        places = _wide(layer, value).flatten(2).transpose(1, 2).contiguous()  # whole channels are copied fastest
        read = places.index_select(1, taps.flatten()).unflatten(1, taps.shape)
        rows: Tensor = read.flatten(0, 1).transpose(1, 2).unflatten(1, (weight_groups(layer), -1)).flatten(2)
        return rows

    return pick


def _wide(layer: Any, x: Tensor) -> Tensor:
    """The input [B, C, ...] with its padding; that of a transposed convolution with zeros between the values too."""
    kind = find_kind(layer)
    if kind is not None and kind.transposed:
        return _stuffed(layer, x)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return functional.pad(x, layer._reversed_padding_repeated_twice, mode=mode)


def _windows(layer: Any, x: Tensor) -> Tensor:
    """Those of a wide input as [B, C, *positions, *kernel], where the weight is [O, C / groups, *kernel]."""
    kind = find_kind(layer)
    transposed = kind is not None and kind.transposed
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
