"""The time step that runs now: the intervals of all quantizers, by one lookup."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ptq_tdq.artifacts import Artifact
from ptq_tdq.errors import ModelError, RuntimeUnsupportedError
from ptq_tdq.intervals.dynamic import Dynamic
from ptq_tdq.scheme import QType
from ptq_tdq.timeaxis import as_vector, lookup


class Interval(NamedTuple):
    """Scale float32 and zero_point int32 of one quantizer: [1] where all samples are alike, else [B]."""

    scale: Tensor
    zero_point: Tensor

    @property
    def each(self) -> bool:
        """Whether samples have intervals of their own."""
        return self.scale.numel() > 1


class Step:
    """Holds the tables of all quantizers side by side, [T, Q], and what they say at the present t.

    Those of one layer are neighbours, in its order.
    """

    def __init__(self, artifact: Artifact) -> None:
        """Raises :class:`RuntimeUnsupportedError` for quantizers that ask a network at run time."""
        for name in artifact.networks:
            raise RuntimeUnsupportedError(
                f"The quantizer '{name}' asks a network for its interval at run time, which has no integer form; "
                'use backend="simulated".'
            )
        tables = {quantizer.name: artifact.tables[quantizer.name] for quantizer in artifact.quantizers}
        bits = {quantizer.name: quantizer.bits for quantizer in artifact.quantizers}
        timed = {name: table for name, table in tables.items() if table.scale is not None}
        self._column = {name: index for index, name in enumerate(timed)}
        self._dynamic = {n: Dynamic(t.zero_point[0], QType(bits[n])) for n, t in tables.items() if t.scale is None}
        self._now: list[Interval] = []
        if timed:
            scales = torch.stack([t.scale for t in timed.values() if t.scale is not None], 1)
            zero_points = torch.stack([t.zero_point for t in timed.values()], 1)
            self._table = torch.stack([scales.view(torch.int32), zero_points], 1)  # [T, 2, Q]: one copy for a row
            # where all samples are alike: a row, and each quantizer's place in it
            self._row = torch.empty_like(self._table[0])
            self._places = list(map(Interval, *(values.split(1) for values in _halves(self._row))))

    def __contains__(self, quantizer: str) -> bool:
        """Whether the quantizer has a table (a dynamic one has not)."""
        return quantizer in self._column

    def set(self, t: Tensor | float | int) -> None:
        """Look all up at t: a scalar or [B]. Raises :class:`~ptq_tdq.errors.TimestepError` outside the tables."""
        if not self._column:
            return
        each = as_vector(t)
        one, *others = set(each.tolist())
        if others:
            found = (lookup(values, each).T.contiguous() for values in _halves(self._table))
            self._now = list(map(Interval, *(values.unbind() for values in found)))
            return
        if 0 <= one < len(self._table) and one == int(one):
            self._row.copy_(self._table[int(one)])
        else:
            for place, values in zip(_halves(self._row), _halves(self._table), strict=True):
                place.copy_(lookup(values, each[:1])[0])
        self._now = self._places

    def interval(self, quantizer: str, x: Tensor) -> Interval:
        """The quantizer's interval for its tensor x [B, ...], which only a dynamic one looks at."""
        if quantizer in self._dynamic:
            scale, zero_point = self._dynamic[quantizer](torch.empty(0), x)
            return Interval(scale, zero_point.contiguous())
        if not self._now:
            raise ModelError("A layer ran outside the model's forward pass; call the model, not its parts.")
        found = self._now[self._column[quantizer]]
        if found.each and len(found.scale) != len(x):
            raise ModelError(
                f"{len(found.scale)} time steps do not fit a batch of {len(x)}; pass one t, or one per sample."
            )
        return found


def _halves(table: Tensor) -> tuple[Tensor, Tensor]:
    """The scales, as float32, and the zero points of [..., 2, Q]: views [..., Q]."""
    return table[..., 0, :].view(torch.float32), table[..., 1, :]
