"""Interval tables inside the graph: two initializers, read once per run at each sample's t.

``scale_table`` and ``zero_point_table`` float32 [T, Q] have a column for each of the Q quantizers whose interval
depends on t; what does not is a constant. The rules are those of :func:`ptq_tdq.timeaxis.lookup`: integer t exact,
fractional t linear between neighbours.
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

SCALES, ZERO_POINTS = "scale_table", "zero_point_table"
RANKS = (2, 3, 4)


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

    ``batch`` int64 [1], ``t`` float32 [batch], ``scales`` and ``zero_points`` float32 [batch, Q] are values of the
    graph, the last two None for Q = 0.
    """

    def __init__(self, b: Builder, artifact: Artifact, sample: ir.Value, timestep: ir.Value) -> None:
        b.prefix = "lookup"
        self.b = b
        self.batch = b("Shape", sample, start=0, end=1)
        self.t = b("Expand", timestep, self.batch, name="timestep_of_each_sample")  # [1] or [batch] -> [batch]
        timed = {name: table for name, table in artifact.tables.items() if table.scale is not None}
        self.columns = [n for n, t in timed.items() if not (_constant(t.scale) and _constant(t.zero_point))]
        self.intervals = {q.name: self._interval(artifact, q.name, q.bits) for q in artifact.quantizers}
        self.scales = self.zero_points = None
        if not self.columns:
            return
        below = b("Floor", self.t)
        low = b("Cast", below, to=ir.DataType.INT64)
        high = b("Min", b("Add", low, np.int64(1)), np.int64(artifact.num_train_timesteps - 1))
        fraction = b("Unsqueeze", b("Sub", self.t, below), axes(1))

        def read(name: str, columns: list[Tensor | None]) -> ir.Value:
            table = b.initializer(name, torch.stack([c for c in columns if c is not None], 1).float().numpy())
            first, second = b("Gather", table, low, axis=0), b("Gather", table, high, axis=0)
            return b("Add", first, b("Mul", b("Sub", second, first), fraction))

        self.scales = read(SCALES, [timed[name].scale for name in self.columns])
        self.zero_points = b("Round", read(ZERO_POINTS, [timed[name].zero_point for name in self.columns]))

    def split(self, matrix: ir.Value | None) -> dict[int, tuple[ir.Value, ...]]:
        """The columns of ``matrix`` [batch, Q] as values [batch, 1, ...] of 2, 3 and 4 axes."""
        b, count, found = self.b, len(self.columns), {}
        for rank in RANKS if matrix is not None else ():
            wide = matrix if rank == 2 else b("Unsqueeze", matrix, axes(*range(2, rank)))
            parts = b.many("Split", wide, count=count, axis=1, num_outputs=count) if count > 1 else (wide,)
            found[rank] = tuple(part for part in parts if part is not None)
        return found

    def dynamic(self, interval: Interval, x: ir.Value, rank: int) -> ir.Value:
        """The scale [batch, 1, ...] that clips no value of the sample x.

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


def _constant(table: Tensor | None) -> bool:
    return table is not None and bool((table == table[0]).all())
