"""Second moments of one layer's inputs in the quantized stream, and with what their errors cost the layer's outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from ptq_tdq.modules import QuantLayer
from ptq_tdq.recon.streams import UnitCall
from ptq_tdq.recon.unit import Unit
from ptq_tdq.timeaxis import at
from ptq_tdq.wrap import switched

ROWS = 32  # inputs that are looked at for each column of the weight, about
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
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
    weights = layer.weight.flatten(1).float().chunk(_groups(layer.layer))
    sums = [_Sums(*weight.shape) for weight in weights]
    each = -(-ROWS * weights[0].shape[1] // len(unit.t))  # positions of each sample
    for batch in unit.batches():
        quantized = _input(unit, layer, mine, batch)
        with switched(unit.module, weights=False, activations=False):
            original = _input(unit, layer, full, batch)
        if quantized is None:  # an expert that nothing was sent to
            continue
        unit.check(quantized, unit.t[batch], f"{layer.record.name} gets")
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

    def __init__(self, outputs: int, columns: int) -> None:
        self.count = 0
        self.mean, self.lost = torch.zeros(columns).double(), torch.zeros(outputs).double()
        self.hessian, self.cross = torch.zeros(columns, columns).double(), torch.zeros(outputs, columns).double()

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
        hessian, cross = self.hessian / self.count, self.cross / self.count
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


def _groups(layer: nn.Module) -> int:
    return layer.groups if isinstance(layer, _CONVOLUTIONS) else 1


def _input(unit: Unit, layer: QuantLayer, call: UnitCall, batch: slice | Tensor) -> Tensor | None:
    """What ``layer`` computes with when the unit runs on some samples: its input behind the quantizers that are on.

    None where the unit does not call it.
    """
    found: list[Tensor] = []

    def stop(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        found.append(args[0])
        raise _Reached

    handle = layer.register_forward_pre_hook(stop)
    try:
        with torch.no_grad():
            unit.run(call, batch)
    except _Reached:
        pass
    finally:
        handle.remove()
    if not found:
        return None
    with torch.no_grad(), at(unit.t[batch]):
        return layer.quantized_input(found[0])


def _picker(layer: nn.Module, x: Tensor, each: int, generator: torch.Generator) -> Callable[[Tensor], Tensor]:
    """A function from inputs like ``x`` [B, ...] to [n, groups, K] at ``each`` random positions of every sample."""
    if isinstance(layer, nn.Linear):
        tokens = x[0].numel() // x.shape[-1]
        index = torch.randperm(tokens, generator=generator)[:each]
        return lambda value: value.reshape(len(value), tokens, -1)[:, index].flatten(0, 1)[:, None].double()
    assert isinstance(layer, _CONVOLUTIONS)
    sizes = _windows(layer, x[:1]).shape[2 : 2 + len(layer.kernel_size)]
    index = torch.randperm(sizes.numel(), generator=generator)[:each]
    where: tuple[slice | Tensor, ...] = (slice(None), slice(None), *torch.unravel_index(index, sizes))

    def pick(value: Tensor) -> Tensor:
        picked = _windows(layer, value)[where].transpose(1, 2)  # [B, n, C, *kernel]
        rows: Tensor = picked.unflatten(2, (layer.groups, -1)).flatten(3).flatten(0, 1)
        return rows.double()

    return pick


def _windows(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Tensor) -> Tensor:
    """The windows of a convolution as a view [B, C, *positions, *kernel]."""
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = functional.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    for i, (size, step, gap) in enumerate(zip(layer.kernel_size, layer.stride, layer.dilation, strict=True)):
        x = x.unfold(2 + i, gap * (size - 1) + 1, step)[..., ::gap]
    return x
