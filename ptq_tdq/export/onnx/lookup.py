"""Interval tables inside the graph: two initializers, read once per run at each sample's t.

``scale_table`` and ``zero_point_table`` float32 [T + 1, Q] have a column for each of the Q quantizers whose interval
depends on t; what does not is a constant. The rules are those of :mod:`ptq_tdq.timeaxis`: t from the model's own time
argument, integer t exact, fractional t linear between neighbours, and a tensor that holds k rows of each sample takes
each t k times.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from ptq_tdq.artifacts import Artifact
from ptq_tdq.export.onnx.nodes import Builder, axes
from ptq_tdq.scheme import QType
from ptq_tdq.timeaxis import NEAR, TimeAxis

ABSENT = 1 << 24  # beyond the end of any table
SCALES, ZERO_POINTS = "scale_table", "zero_point_table"


@dataclass(frozen=True)
class Interval:
    """What is known of one quantizer before the graph runs.

    ``scale`` is None where it depends on t or, for a dynamic quantizer, on x; ``zero_point`` where it depends on t.
    ``column`` is the quantizer's place in the tables, None if it has none.
    """

    qtype: QType
    scale: np.float32 | None
    zero_point: int | None
    column: int | None


class Lookup:
    """Builds the lookup at the start of the graph.

    ``time`` is the input that holds the time argument [batch, ...], ``batch`` what its first size is called in the
    shapes of the graph: a name, or the number of samples that the graph is of. ``scales`` and ``zero_points`` float32
    [batch, Q] are values of the graph, None for Q = 0; with ``one_step`` they are [1, Q], and a call whose samples have
    different t ends in an error of the runtime.
    """

    def __init__(self, b: Builder, artifact: Artifact, time: ir.Value, batch: str, one_step: bool = False) -> None:
        b.prefix = "lookup"
        self.b, self.symbol, self.one_step = b, batch, one_step
        self.batch = b("Shape", time, start=0, end=1)
        tables = {q.name: artifact.tables[q.name] for q in artifact.quantizers}  # in execution order
        timed = {name: table for name, table in tables.items() if table.scale is not None}
        self.columns = [n for n, t in timed.items() if not (_constant(t.scale) and _constant(t.zero_point))]
        self.intervals = {q.name: self._interval(artifact, q.name, q.bits) for q in artifact.quantizers}
        self.scales = self.zero_points = None
        if not self.columns:
            return
        t = self._t(time, artifact.time_axis)
        if one_step:
            t = self._shared(t)
        below = b("Floor", t)
        low = b("Cast", below, to=ir.DataType.INT64)
        high = b("Min", b("Add", low, np.int64(1)), np.int64(artifact.time_axis.num_train_timesteps))
        fraction = b("Unsqueeze", b("Sub", t, below), axes(1))

        def read(name: str, columns: list[Tensor | None]) -> ir.Value:
            table = b.initializer(name, torch.stack([c for c in columns if c is not None], 1).float().numpy())
            first, second = b("Gather", table, low, axis=0), b("Gather", table, high, axis=0)
            return b("Add", first, b("Mul", b("Sub", second, first), fraction))

        self.scales = read(SCALES, [timed[name].scale for name in self.columns])
        self.zero_points = b("Round", read(ZERO_POINTS, [timed[name].zero_point for name in self.columns]))

    def table(self, matrix: ir.Value | None) -> Columns:
        """The columns of ``matrix`` [batch, Q]."""
        return Columns(self, matrix)

    def lead(self, x: ir.Value) -> str | None:
        """What the first size of ``x`` is called; None where it is the same for any batch."""
        size = None if x.shape is None else x.shape[0]
        name = str(getattr(size, "value", size))
        if name.isdecimal():
            samples = int(self.symbol) if self.symbol.isdecimal() else 1
            return name if samples > 1 and int(name) % samples == 0 else None
        return f"rows of {x.name}" if name == "None" else name

    def length(self, x: ir.Value) -> ir.Value:
        """The first size of ``x`` as int64 [1]."""
        return self.batch if self.lead(x) == self.symbol else self.b("Shape", x, start=0, end=1)

    def dynamic(self, interval: Interval, x: ir.Value, rank: int) -> ir.Value:
        """The scale [rows, 1, ...] that clips no value of each row of x.

        See :class:`ptq_tdq.intervals.dynamic.Dynamic`.
        """
        b, zero_point = self.b, interval.zero_point
        assert zero_point is not None
        rest = axes(*range(1, rank))
        scale: ir.Value | np.generic = np.finfo(np.float32).tiny
        if interval.qtype.qmax > zero_point:
            top = b("ReduceMax", x, rest, keepdims=1)
            scale = b("Max", b("Div", top, np.float32(interval.qtype.qmax - zero_point)), scale)
        if zero_point > interval.qtype.qmin:
            bottom = b("ReduceMin", x, rest, keepdims=1)
            scale = b("Max", b("Div", bottom, np.float32(interval.qtype.qmin - zero_point)), scale)
        assert isinstance(scale, ir.Value)
        return scale

    def _t(self, time: ir.Value, axis: TimeAxis) -> ir.Value:
        """The scheduler's time step of each sample, float32 [batch], as :meth:`TimeAxis.t` finds it."""
        b = self.b
        rank = 1 if time.shape is None else time.shape.rank()
        value = b("Cast", time, to=ir.DataType.FLOAT)
        if rank > 1:  # a time for each token: the largest counts
            value = b("ReduceMax", value, axes(*range(1, rank)), keepdims=0)
        if (axis.scale, axis.offset) != (1, 0):
            value = b("Add", b("Mul", value, np.float32(axis.scale)), np.float32(axis.offset))
        nearest = b("Round", value)
        near = b("Less", b("Abs", b("Sub", value, nearest)), np.float32(NEAR))
        return b("Where", near, nearest, value, name="lookup/t")

    def _shared(self, t: ir.Value) -> ir.Value:
        """The t [1] of all samples; where they differ, one that no table has."""
        b = self.b
        low, high = b("ReduceMin", t, keepdims=1), b("ReduceMax", t, keepdims=1)
        return b("Where", b("Equal", low, high), low, np.float32(ABSENT), name="lookup/one t for all samples")

    def _interval(self, artifact: Artifact, name: str, bits: int) -> Interval:
        table = artifact.tables[name]
        column = self.columns.index(name) if name in self.columns else None
        fixed = table.scale is not None and column is None
        return Interval(
            QType(bits),
            np.float32(table.scale[0].item()) if fixed and table.scale is not None else None,
            int(table.zero_point[0]) if _constant(table.zero_point) else None,
            column,
        )


class Columns:
    """The columns of a matrix [batch, Q] in shapes that fit the tensors of the graph."""

    def __init__(self, lookup: Lookup, matrix: ir.Value | None) -> None:
        self.lookup, self.matrix = lookup, matrix
        self._rows: dict[str | None, ir.Value] = {}
        self._split: dict[tuple[str | None, int], tuple[ir.Value, ...]] = {}
        self._numbers: tuple[ir.Value, ...] | None = None

    def of(self, column: int, x: ir.Value, rank: int) -> ir.Value:
        """A column as [rows of x, 1, ...] of ``rank`` axes; [1, 1, ...] for an x that is the same for any batch."""
        b, key = self.lookup.b, (self.lookup.lead(x), rank)
        if key not in self._split:
            before, b.prefix = b.prefix, "lookup"
            wide = self._of_rows(x)
            if rank > 2:
                wide = b("Unsqueeze", wide, axes(*range(2, rank)))
            count = len(self.lookup.columns)
            parts = b.many("Split", wide, count=count, axis=1, num_outputs=count) if count > 1 else (wide,)
            self._split[key] = parts
            b.prefix = before
        return self._split[key][column]

    def only(self, column: int | None) -> ir.Value:
        """A column as [1], where all samples have one t."""
        assert column is not None and self.matrix is not None
        if self._numbers is None:
            before, b, count = self.lookup.b.prefix, self.lookup.b, len(self.lookup.columns)
            b.prefix = "lookup"
            row = b("Reshape", self.matrix, axes(-1))
            self._numbers = b.many("Split", row, count=count, axis=0, num_outputs=count) if count > 1 else (row,)
            b.prefix = before
        return self._numbers[column]

    def _of_rows(self, x: ir.Value) -> ir.Value:
        """The matrix with a row for each row of x."""
        b, lead, matrix = self.lookup.b, self.lookup.lead(x), self.matrix
        assert matrix is not None
        if self.lookup.one_step:
            return matrix
        if lead not in self._rows:
            if lead is None:
                self._rows[lead] = b("Gather", matrix, axes(0), axis=0)
            elif lead == self.lookup.symbol:
                self._rows[lead] = matrix
            else:
                times = b("Div", self.lookup.length(x), self.lookup.batch)
                shape = b("Concat", self.lookup.batch, times, axes(len(self.lookup.columns)), axis=0)
                each = b("Expand", b("Unsqueeze", matrix, axes(1)), shape)
                self._rows[lead] = b("Reshape", each, axes(-1, len(self.lookup.columns)))
        return self._rows[lead]


def _constant(table: Tensor | None) -> bool:
    return table is not None and bool((table == table[0]).all())
