"""Second moments of one layer's inputs in the quantized stream, and with what their errors cost the layer's outputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ptq_tdq import processes
from ptq_tdq.modules import QuantLayer
from ptq_tdq.modules.layers import weight_groups
from ptq_tdq.recon.unit import as_slice, check_finite
from ptq_tdq.recon.visits import Visits
from ptq_tdq.recon.windows import picker, positions
from ptq_tdq.timeaxis import at
from ptq_tdq.wrap import switched

ROWS = 32  # inputs that are looked at for each column of the weight, about
KEPT = 1 << 28  # numbers that are kept of all of them, at most
PIECE = 1 << 23  # numbers that are picked at once
CACHED = 1 << 19  # numbers that stay in the cache while they are gone over several times
SUMMED = 1 << 13  # rows whose products are summed in float32
COLUMNS = 6144  # of the weight that are solved for together, at most
MODERATE = 40  # numbers between 2 to the power of this and one over it are multiplied in float32 as they are


class Inputs:
    """Own rows of the quantized inputs x_hat [K] of a layer (of one group of it), and what its outputs lack [O].

    ``mean`` [K] is the mean of x_hat and ``lost`` [O] that of d = W (x - x_hat), x being the full-precision inputs;
    both float64. Where the layer is solved in several blocks, e is what rounding the blocks so far has lost. Rows are
    kept in float32, once :meth:`close` has taken the means (where ``centred``) and, of sizes that are not moderate,
    powers of two out of them: a second moment less the square of a mean is noise where inputs hardly vary, and squares
    of all that float32 holds need float64, in which the sums are.
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
        """All rows of all processes are there; the moments are about the means where ``centred``. Returns itself."""
        self.count = sum(processes.gather([self.count]))
        self.mean, self.lost = processes.total(self.mean), processes.total(self.lost)
        for mean, pieces in ((self.mean, self._x), (self.lost, self._lost[0])):
            mean /= self.count or 1  # an expert that no sample reached has no moments
            near = mean.float()
            rest, largest = (mean - near).float(), torch.zeros_like(near)
            for rows in _cached(pieces):
                if centred:
                    rows.sub_(near).sub_(rest)
                torch.maximum(largest, rows.abs().amax(0), out=largest)
            exponents = _exponents(processes.greatest(largest))
            self._exponents.append(exponents.double())
            half = torch.div(exponents, 2, rounding_mode="floor")
            scales = [torch.ldexp(torch.ones_like(near), -part) for part in (half, exponents - half)]
            for rows in _cached(pieces) if bool(exponents.any()) else ():
                rows.mul_(scales[0]).mul_(scales[1])  # one factor alone may be more than float32 holds
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
        edges = range(0, len(of_x), -(-len(of_x) // 8))
        for rows in self._x:
            x = rows[:, columns]
            for i in edges:  # the upper triangle, nearly
                some = slice(i, i + edges.step)
                hessian[some, i:] += x[:, some].t() @ x[:, i:]
        hessian = processes.total(hessian)
        hessian = (hessian.triu() + hessian.triu(1).t()) / (self.count or 1)
        found = []
        for pieces in self._lost:
            cross = of_x.new_zeros(len(of_lost), len(of_x))
            for rows, lost in zip(self._x, pieces, strict=True):
                cross += lost.t() @ rows[:, columns]
            cross = processes.total(cross) / (self.count or 1)
            found.append(torch.ldexp(torch.ldexp(cross, of_x), of_lost[:, None]))
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


def inputs(visits: Visits, layers: Sequence[QuantLayer], generator: torch.Generator) -> list[list[Inputs]]:
    """Rows of what layers with one input compute with, for each of their groups: all samples at random positions."""
    unit = visits.unit
    chunks = [layer.weight.flatten(1).float().chunk(weight_groups(layer.layer)) for layer in layers]
    found = [[Inputs(len(w), w.shape[1], w.device) for w in own] for own in chunks]
    weights = [[_scaled(w.t(), 0) for w in own] for own in chunks]

    def look(sample: Tensor) -> list[int]:
        if processes.count() == 1:
            return []
        x = visits.input(layers[0], visits.mine, sample)
        return [1 if x is None else positions(layer.layer, x).numel() for layer in layers]

    for _, here, places in unit.turns(look):
        if not len(here):
            for count in places:
                torch.randperm(count, generator=generator)
            continue
        batch = as_slice(here)
        mine_raw, full_raw = visits.inputs(layers[0], batch)
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
    processes.follow(generator)
    return found


def _pick(
    layer: QuantLayer, weights: Sequence[tuple[Tensor, Tensor]], groups: list[Inputs], quantized: Tensor,
    original: Tensor, samples: int, generator: torch.Generator,
) -> None:  # fmt: skip
    """Add rows of a batch of one layer's inputs, as many of each sample as ``samples`` of them are to give.

    ``weights`` are those of the groups, [K, O], as :func:`_scaled` gives them.
    """
    columns, outputs = weights[0][0].shape
    each = -(-rows_of(len(weights), columns, outputs) // samples)
    pick = picker(layer.layer, quantized, each, generator)
    piece = max(1, PIECE // (each * len(weights) * columns))
    for values in zip(quantized.split(piece), original.split(piece), strict=True):
        seen, meant = map(pick, values)
        for group, (weight, own) in enumerate(zip(weights, groups, strict=True)):
            x = seen[:, group].float().contiguous()
            own.add(x, _lost(meant[:, group].float(), x, *weight))


def rows_of(groups: int, columns: int, outputs: int) -> int:
    """How many rows of a layer's inputs are looked at, at most."""
    return min(ROWS * columns, KEPT // (groups * (columns + outputs)))


def _lost(meant: Tensor, seen: Tensor, weight: Tensor, exponents: Tensor) -> Tensor:
    """``(meant - seen) weight`` [n, O] for numbers of any size; ``weight`` has lost powers of two, ``exponents``."""
    found, rows = [], max(1, CACHED // seen.shape[1])
    for a, b in zip(meant.split(rows), seen.split(rows), strict=True):
        difference = a - b
        if bool(difference.abs().amax(1).isinf().any()):  # float32 does not hold it
            difference = a.double() - b
        difference, of_rows = _scaled(difference, 1)
        output = difference @ weight
        if bool(of_rows.any()) or bool(exponents.any()):
            output = torch.ldexp(torch.ldexp(output.double(), of_rows), exponents).float()
        found.append(output)
    return torch.cat(found)


def _scaled(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """``x`` with rows or columns that float32 multiplies, and the exponents of two that were taken out of them."""
    exponent = _exponents(x.abs().amax(dim, keepdim=True))
    return torch.ldexp(x.double(), -exponent).float() if bool(exponent.any()) else x.float(), exponent


def _exponents(largest: Tensor) -> Tensor:
    """Of sizes, the powers of two to be taken out: none where all are moderate."""
    exponents = torch.frexp(largest).exponent
    return exponents if bool((exponents.abs() > MODERATE).any()) else torch.zeros_like(exponents)


def _cached(pieces: Sequence[Tensor]) -> Iterator[Tensor]:
    """Rows of all pieces, few at a time."""
    for piece in pieces:
        yield from piece.split(max(1, CACHED // max(1, piece.shape[1])))
