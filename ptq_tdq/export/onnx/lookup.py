"""Interval tables inside the graph: two initializers, read once per run at each sample's t.

``scale_table`` float32 [T, Q] has a column for each quantizer whose interval depends on t, ``zero_point_table`` [T, Z]
one for each whose zero point does. What does not depend on t is a constant. The rules are those of
:func:`ptq_tdq.timeaxis.lookup`: integer t exact, fractional t linear between neighbours.
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


@dataclass(frozen=True)
class Interval:
    """Scale and zero point of one quantizer.

    ``scale`` and ``zero_points`` float32 [batch, 1] are values of the graph; where they do not depend on t or x the
    number is in ``fixed_scale`` (then ``scale`` is None) and ``zero_point``. Only a dynamic quantizer has neither
    scale.
    """

    qtype: QType
    scale: ir.Value | None
    fixed_scale: np.float32 | None
    zero_points: ir.Value | None
    zero_point: int | None


class Lookup:
    """Builds the lookup at the start of the graph and answers for each quantizer."""

    def __init__(self, b: Builder, artifact: Artifact, sample: ir.Value, timestep: ir.Value) -> None:
        b.prefix = "lookup"
        batch = b("Shape", sample, start=0, end=1)
        self.t = b("Expand", timestep, batch, name="timestep_of_each_sample")  # [1] or [batch] -> [batch]
        self._b, self._last = b, artifact.num_train_timesteps - 1
        below = b("Floor", self.t)
        self._low = b("Cast", below, to=ir.DataType.INT64)
        self._high = b("Min", b("Add", self._low, np.int64(1)), np.int64(self._last))
        self._fraction = b("Unsqueeze", b("Sub", self.t, below), axes(1))
        scales, zeros = {}, {}
        for name, table in artifact.tables.items():
            if table.scale is not None and not _constant(table.scale):
                scales[name] = table.scale
            if not _constant(table.zero_point):
                zeros[name] = table.zero_point.float()
        scale_values = self._read(SCALES, scales)
        zero_values = self._read(ZERO_POINTS, zeros, integers=True)
        self.columns = {SCALES: list(scales), ZERO_POINTS: list(zeros)}
        self._intervals = {
            q.name: Interval(
                QType(q.bits),
                scale_values.get(q.name),
                None if table.scale is None or q.name in scales else np.float32(table.scale[0].item()),
                zero_values.get(q.name),
                None if q.name in zeros else int(table.zero_point[0]),
            )
            for q in artifact.quantizers
            for table in [artifact.tables[q.name]]
        }

    def _read(self, name: str, columns: dict[str, Tensor], integers: bool = False) -> dict[str, ir.Value]:
        """Values [batch, 1] of each column at the samples' t."""
        if not columns:
            return {}
        b = self._b
        table = b.initializer(name, torch.stack(list(columns.values()), 1).numpy())
        low, high = b("Gather", table, self._low, axis=0), b("Gather", table, self._high, axis=0)
        rows = b("Add", low, b("Mul", b("Sub", high, low), self._fraction))
        rows = b("Round", rows) if integers else rows
        if len(columns) == 1:
            return dict.fromkeys(columns, rows)
        parts = b.many("Split", rows, count=len(columns), axis=1, num_outputs=len(columns))
        return dict(zip(columns, parts, strict=True))

    def at(self, name: str, x: ir.Value, rank: int) -> Interval:
        """The interval of the quantizer ``name`` for its input ``x`` [batch, ...] of ``rank`` axes."""
        interval = self._intervals[name]
        if interval.scale is not None or interval.fixed_scale is not None:
            return interval
        return Interval(interval.qtype, self._dynamic(interval, x, rank), None, None, interval.zero_point)

    def _dynamic(self, interval: Interval, x: ir.Value, rank: int) -> ir.Value:
        """The least scale that clips no value of the sample; see :class:`ptq_tdq.intervals.dynamic.Dynamic`."""
        b, zero_point = self._b, interval.zero_point
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
        return b("Reshape", scale, axes(-1, 1))


def _constant(table: Tensor) -> bool:
    return bool((table == table[0]).all())
