"""The time step that runs now: the intervals of all quantizers, by one lookup."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ptq_tdq.artifacts import Artifact
from ptq_tdq.errors import ModelError, RuntimeUnsupportedError
from ptq_tdq.intervals.dynamic import Dynamic
from ptq_tdq.scheme import QType
from ptq_tdq.timeaxis import lookup

REMEMBERED = 128  # time steps whose intervals are kept ready: a sampler comes back to its steps


class Interval(NamedTuple):
    """Scale float32 and zero_point int32 of one quantizer: [1] where all samples are alike, else [B]."""

    scale: Tensor
    zero_point: Tensor
    uniform: float | None  # the scale as a number, where all samples are alike


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
        self._scale = torch.stack([t.scale for t in timed.values() if t.scale is not None], 1) if timed else None
        self._zero_point = torch.stack([t.zero_point for t in timed.values()], 1) if timed else None
        self._dynamic = {n: Dynamic(t.zero_point[0], QType(bits[n])) for n, t in tables.items() if t.scale is None}
        self._now: list[Interval] = []
        self._ready: dict[float, list[Interval]] = {}

    def __contains__(self, quantizer: str) -> bool:
        """Whether the quantizer has a table (a dynamic one has not)."""
        return quantizer in self._column

    def set(self, t: Tensor | float | int) -> None:
        """Look all up at t: a scalar or [B]. Raises :class:`~ptq_tdq.errors.TimestepError` outside the tables."""
        if self._scale is None or self._zero_point is None:
            return
        each = torch.atleast_1d(torch.as_tensor(t))
        if each.numel() > 1 and not bool((each == each[0]).all()):
            self._now = self._look_up(each)
            return
        key = float(each[0])
        if key not in self._ready:
            if len(self._ready) == REMEMBERED:
                self._ready.clear()
            self._ready[key] = self._look_up(each[:1])
        self._now = self._ready[key]

    def _look_up(self, t: Tensor) -> list[Interval]:
        """The intervals of all quantizers at t [1], for all samples, or [B]."""
        assert self._scale is not None and self._zero_point is not None
        if len(t) == 1 and float(t).is_integer() and 0 <= float(t) < len(self._scale):  # a row as it lies in memory
            scale, zero_point = self._scale[int(t)][:, None], self._zero_point[int(t)][:, None]
        else:
            scale, zero_point = (lookup(table, t).T.contiguous() for table in (self._scale, self._zero_point))
        numbers = scale[:, 0].tolist() if len(t) == 1 else [None] * len(scale)
        return list(map(Interval, scale.unbind(), zero_point.unbind(), numbers))

    def interval(self, quantizer: str, x: Tensor) -> Interval:
        """The quantizer's interval for its tensor x [B, ...], which only a dynamic one looks at."""
        if quantizer in self._dynamic:
            scale, zero_point = self._dynamic[quantizer](torch.empty(0), x)
            return Interval(scale, zero_point.contiguous(), None)
        if not self._now:
            raise ModelError("A layer ran outside the model's forward pass; call the model, not its parts.")
        found = self._now[self._column[quantizer]]
        if found.uniform is None and len(found.scale) != len(x):
            raise ModelError(
                f"{len(found.scale)} time steps do not fit a batch of {len(x)}; pass one t, or one per sample."
            )
        return found
