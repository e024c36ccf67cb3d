"""Second moments of one layer's inputs in the quantized stream, and with what their errors cost the layer's outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ptq_tdq.modules import QuantLayer
from ptq_tdq.modules.layers import find_kind, layer_input, weight_groups
from ptq_tdq.recon.streams import UnitCall
from ptq_tdq.recon.unit import Unit, check_finite
from ptq_tdq.timeaxis import at
from ptq_tdq.wrap import switched

ROWS = 32  # inputs that are looked at for each column of the weight, about
PIECE = 1 << 23  # numbers that are picked at once


@dataclass(frozen=True)
class Moments:
    """Of the quantized inputs x_hat [K] of a layer (of one group of it), and of what their errors cost its outputs.

    ``hessian`` [K, K] is E[x_hat x_hat^T] and ``cross`` [O, K] is E[d x_hat^T] with d = W (x - x_hat), x being the
    full-precision inputs; both about the means where ``centred``. ``mean`` [K] is the mean of x_hat, ``lost`` [O] of d.
    """

    hessian: Tensor
    cross: Tensor
    mean: Tensor
    lost: Tensor
    centred: bool


class _Reached(Exception):
    """The layer's input is known; the rest of the unit need not run."""


def moments(
    unit: Unit, layer: QuantLayer, full: UnitCall, mine: UnitCall, generator: torch.Generator, *, centred: bool
) -> list[Moments]:
    """Moments of a layer's inputs, one for each of its groups, from all samples at random positions."""
    weights = layer.weight.flatten(1).float().chunk(weight_groups(layer.layer))
    sums = [_Sums(len(weight), weight.shape[1], weight.device) for weight in weights]
    each = -(-ROWS * weights[0].shape[1] // len(unit.t))  # positions of each sample
    for batch in unit.batches():
        quantized = _input(unit, layer, mine, batch)
        with switched(unit.module, weights=False, activations=False):
            original = _input(unit, layer, full, batch)
        if quantized is None or not len(quantized):  # an expert that nothing was sent to
            continue
        check_finite(quantized, unit.t[batch], f"{layer.record.name} gets")
        if original is None or original.shape != quantized.shape:  # other rows were sent to it: nothing to compare with
            original = quantized
        pick = _picker(layer.layer, quantized, each, generator)
        piece = max(1, PIECE // (each * weights[0].shape[1]))
        for values in zip(quantized.split(piece), original.split(piece), strict=True):
            seen, meant = map(pick, values)
            for group, (weight, own) in enumerate(zip(weights, sums, strict=True)):
                x = seen[:, group]
                own.add(x, _product(meant[:, group] - x, weight.t()))
    return [own.finished(centred) for own in sums]


class _Sums:
    """Means, and products about them, of all rows so far, in float64 and without large terms that cancel.

    A second moment less the square of the mean is noise where inputs hardly vary; so each piece is taken about its own
    mean, and the pieces are joined as Chan, Golub and LeVeque do (1979): sums of positive semidefinite matrices only.
    """

    def __init__(self, outputs: int, columns: int, device: torch.device) -> None:
        self.count = 0
        self.mean, self.lost, self.hessian, self.cross = (
            torch.zeros(shape, dtype=torch.float64, device=device)
            for shape in ((columns,), (outputs,), (columns, columns), (outputs, columns))
        )

    def add(self, x: Tensor, difference: Tensor) -> None:
        """Rows ``x`` [n, K] and ``difference`` [n, O], float64."""
        count = self.count + len(x)
        mean, lost = x.mean(0), difference.mean(0)
        x, difference = x - mean, difference - lost
        to_mean, to_lost = mean - self.mean, lost - self.lost
        between = self.count * len(x) / count
        self.hessian += _product(x.t(), x) + between * torch.outer(to_mean, to_mean)
        self.cross += _product(difference.t(), x) + between * torch.outer(to_lost, to_mean)
        self.mean += to_mean * (len(x) / count)
        self.lost += to_lost * (len(x) / count)
        self.count = count

    def finished(self, centred: bool) -> Moments:
        count = self.count or 1  # an expert that no sample reached has no moments
        hessian, cross = self.hessian / count, self.cross / count
        if not centred:
            hessian += torch.outer(self.mean, self.mean)
            cross += torch.outer(self.lost, self.mean)
        return Moments(hessian, cross, self.mean, self.lost, centred)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` in float64 for any sizes; computed in float32, twice as fast, once the powers of two are taken out."""
    a, of_rows = _small(a, 1)
    b, of_columns = _small(b, 0)
    return torch.ldexp(torch.ldexp((a @ b).double(), of_rows), of_columns)


def _small(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """``x`` as float32 numbers below 1, and the exponents that were taken out of its rows or columns."""
    exponent = torch.frexp(x.abs().amax(dim, keepdim=True)).exponent.double()
    return torch.ldexp(x.double(), -exponent).float(), exponent


def _input(unit: Unit, layer: QuantLayer, call: UnitCall, batch: slice | Tensor) -> Tensor | None:
    """What ``layer`` computes with when the unit runs on some samples: its input behind the quantizers that are on.

    None where the unit does not call it.
    """
    found: list[Tensor] = []

    def stop(module: nn.Module, args: Any, kwargs: Any) -> None:
        x = layer_input(args, kwargs)
        assert x is not None
        found.append(x)
        raise _Reached

    handle = layer.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with torch.no_grad():
            unit.run(call, batch)
    except _Reached:
        pass
    finally:
        handle.remove()
    if not found:
        return None
    with torch.no_grad(), at(unit.t[batch].to(found[0].device)):
        return layer.quantized_input(found[0])


def _picker(layer: nn.Module, x: Tensor, each: int, generator: torch.Generator) -> Callable[[Tensor], Tensor]:
    """A function from inputs like ``x`` [B, ...] to [n, groups, K] at ``each`` random positions of every sample."""
    if isinstance(layer, nn.Linear):
        tokens = x[0].numel() // x.shape[-1]
        index = torch.randperm(tokens, generator=generator)[:each]
        return lambda value: value.reshape(len(value), tokens, -1)[:, index].flatten(0, 1)[:, None].double()
    sizes = _windows(layer, x[:1]).shape[2 : x.ndim]
    index = torch.randperm(sizes.numel(), generator=generator)[:each]
    where: tuple[slice | Tensor, ...] = (slice(None), slice(None), *torch.unravel_index(index, sizes))

    def pick(value: Tensor) -> Tensor:
        picked = _windows(layer, value)[where].transpose(1, 2)  # [B, n, C, *kernel]
        rows: Tensor = picked.unflatten(2, (weight_groups(layer), -1)).flatten(3).flatten(0, 1)
        return rows.double()

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
