"""Second moments of one layer's inputs in the quantized stream, and with what their errors cost the layer's outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ptq_tdq.modules import QuantLayer
from ptq_tdq.modules.layers import layer_input, weight_groups
from ptq_tdq.recon.streams import UnitCall
from ptq_tdq.recon.unit import Unit, check_finite
from ptq_tdq.recon.windows import picker
from ptq_tdq.timeaxis import at
from ptq_tdq.wrap import switched

ROWS = 32  # inputs that are looked at for each column of the weight, about
KEPT = 1 << 28  # numbers that are kept of all of them, at most
PIECE = 1 << 23  # numbers that are picked at once
SUMMED = 1 << 13  # rows whose products are summed in float32
COLUMNS = 6144  # of the weight that are solved for together, at most


class Inputs:
    """Rows of the quantized inputs x_hat [K] of a layer (of one group of it), and what its outputs lack [O].

    ``mean`` [K] is the mean of x_hat and ``lost`` [O] that of d = W (x - x_hat), x being the full-precision inputs;
    both float64. Where the layer is solved in several blocks, e is what rounding the blocks so far has lost. Rows are
    kept in float32, once :meth:`close` has taken the means (where ``centred``) and powers of two out of them: a second
    moment less the square of a mean is noise where inputs hardly vary, and squares of all that float32 holds need
    float64, in which the sums are.
    """

    def __init__(self, outputs: int, columns: int, device: torch.device) -> None:
        self.count = 0
        self.mean, self.lost = (torch.zeros(n, dtype=torch.float64, device=device) for n in (columns, outputs))
        self._x: list[Tensor] = []
        self._lost: list[list[Tensor]] = [[]]  # d and, from the second block on, e
        self._exponents: list[Tensor] = []  # of x and of what is lost

    def add(self, x: Tensor, difference: Tensor) -> None:
        """Rows ``x`` [n, K] of x_hat and ``difference`` [n, O] of d, float32."""
        self.count += len(x)
        self.mean += x.sum(0, dtype=torch.float64)
        self.lost += difference.sum(0, dtype=torch.float64)
        self._x += x.split(SUMMED)
        self._lost[0] += difference.split(SUMMED)

    def close(self, *, centred: bool) -> Inputs:
        """All rows are there; the moments are about the means where ``centred``. Returns itself."""
        for mean, pieces in ((self.mean, self._x), (self.lost, self._lost[0])):
            mean /= self.count or 1  # an expert that no sample reached has no moments
            largest = torch.zeros_like(mean)
            for rows in pieces:
                if centred:
                    rows.copy_(rows.double().sub_(mean))
                torch.maximum(largest, rows.abs().amax(0), out=largest)
            self._exponents.append(torch.frexp(largest).exponent.double())
            for rows in pieces:
                rows.copy_(torch.ldexp(rows.double(), -self._exponents[-1]))
        return self

    def blocks(self, taps: int) -> list[slice]:
        """Columns that are solved for together: all, or about equal pieces of whole channels with ``taps`` each."""
        channels = len(self.mean) // taps
        count = min(-(-len(self.mean) // COLUMNS), channels)
        edges = [taps * (channels * i // count) for i in range(count + 1)]
        return list(map(slice, edges, edges[1:]))

    def moments(self, columns: slice) -> tuple[Tensor, list[Tensor]]:
        """E[x_hat x_hat^T] [k, k] of some columns, and E[d x_hat^T], perhaps E[e x_hat^T] [O, k]; float64."""
        of_x, of_lost = self._exponents[0][columns], self._exponents[1]
        hessian = of_x.new_zeros(len(of_x), len(of_x))
        edges = range(0, len(of_x), -(-len(of_x) // 4))
        for rows in self._x:
            x = rows[:, columns]
            for i in edges:  # the upper triangle, nearly
                some = slice(i, i + edges.step)
                hessian[some, i:] += x[:, some].t() @ x[:, i:]
        hessian = (hessian.triu() + hessian.triu(1).t()) / (self.count or 1)
        found = []
        for pieces in self._lost:
            cross = of_x.new_zeros(len(of_lost), len(of_x))
            for rows, lost in zip(self._x, pieces, strict=True):
                cross += lost.t() @ rows[:, columns]
            found.append(torch.ldexp(torch.ldexp(cross / (self.count or 1), of_x), of_lost[:, None]))
        return torch.ldexp(torch.ldexp(hessian, of_x), of_x[:, None]), found

    def solved(self, columns: slice, made_up: Tensor, lost: Tensor) -> None:
        """Some columns have ``made_up`` for d and ``lost`` by rounding so much of their weight [O, k]."""
        if len(self._lost) == 1:
            self._lost.append([torch.zeros_like(rows) for rows in self._lost[0]])
        of_x, of_lost = self._exponents[0][columns], self._exponents[1]
        for change, pieces in zip((-made_up, lost), self._lost, strict=True):
            factor = torch.ldexp(torch.ldexp(change, of_x), -of_lost[:, None]).float().t()
            for rows, piece in zip(self._x, pieces, strict=True):
                piece.addmm_(rows[:, columns], factor)


class _Reached(Exception):
    """The layer's input is known; the rest of the unit need not run."""


def same_input(unit: Unit, call: UnitCall) -> list[list[QuantLayer]]:
    """The unit's layers in order, those that are given the very same tensor together (q, k and v)."""
    layers, seen = unit.layers(), dict[QuantLayer, tuple[Tensor, int]]()

    def hear(layer: nn.Module, args: Any, kwargs: Any) -> None:
        x = layer_input(args, kwargs)
        assert x is not None and isinstance(layer, QuantLayer)
        seen.setdefault(layer, (x, x._version))

    handles = [layer.register_forward_pre_hook(hear, with_kwargs=True) for layer in layers]
    try:
        with torch.no_grad():
            unit.run(call, next(iter(unit.cells))[:1])
    finally:
        for handle in handles:
            handle.remove()
    groups: list[list[QuantLayer]] = []
    for layer in layers:
        mine, last = seen.get(layer), seen.get(groups[-1][-1]) if groups else None
        if mine and last and mine[0] is last[0] and mine[1] == last[1]:
            groups[-1].append(layer)
        else:
            groups.append([layer])
    return groups


def inputs(
    unit: Unit, layers: Sequence[QuantLayer], full: UnitCall, mine: UnitCall, generator: torch.Generator
) -> list[list[Inputs]]:
    """Rows of what layers with one input compute with, for each of their groups: all samples at random positions."""
    weights = [layer.weight.flatten(1).float().chunk(weight_groups(layer.layer)) for layer in layers]
    found = [[Inputs(len(w), w.shape[1], w.device) for w in own] for own in weights]
    for batch in unit.batches():
        mine_raw = _input(unit, layers[0], mine, batch)
        with switched(unit.module, weights=False, activations=False):
            full_raw = _input(unit, layers[0], full, batch)
        if mine_raw is None or not len(mine_raw):  # an expert that nothing was sent to
            continue
        if full_raw is None or full_raw.shape != mine_raw.shape:  # other rows were sent to it: nothing to compare with
            full_raw = None
        for layer, own, groups in zip(layers, weights, found, strict=True):
            with torch.no_grad(), at(unit.t[batch].to(mine_raw.device)):
                quantized = layer.quantized_input(mine_raw)
            check_finite(quantized, unit.t[batch], f"{layer.record.name} gets")
            with switched(layer, weights=False, activations=False), torch.no_grad():
                original = quantized if full_raw is None else layer.quantized_input(full_raw)
            _pick(layer, own, groups, quantized, original, len(unit.t), generator)
    return found


def _pick(
    layer: QuantLayer, weights: Sequence[Tensor], groups: list[Inputs], quantized: Tensor, original: Tensor,
    samples: int, generator: torch.Generator,
) -> None:  # fmt: skip
    """Add rows of a batch of one layer's inputs, as many of each sample as ``samples`` of them are to give."""
    outputs, columns = weights[0].shape
    each = -(-rows_of(len(weights), columns, outputs) // samples)
    pick = picker(layer.layer, quantized, each, generator)
    piece = max(1, PIECE // (each * len(weights) * columns))
    for values in zip(quantized.split(piece), original.split(piece), strict=True):
        seen, meant = map(pick, values)
        for group, (weight, own) in enumerate(zip(weights, groups, strict=True)):
            x = seen[:, group]
            own.add(x.float().contiguous(), _product(meant[:, group].double() - x, weight.t()).float())


def rows_of(groups: int, columns: int, outputs: int) -> int:
    """How many rows of a layer's inputs are looked at, at most."""
    return min(ROWS * columns, KEPT // (groups * (columns + outputs)))


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
    """What ``layer`` is given when the unit runs on some samples; None where the unit does not call it."""
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
    return found[0] if found else None
