"""Intervals that are known already, in the place of what calibration observes: sources built from them start there."""

from __future__ import annotations

from torch import Tensor

from ptq_tdq.intervals.base import Observed
from ptq_tdq.intervals.choices import IntervalChoices
from ptq_tdq.scheme import QType
from ptq_tdq.search import Histogram, QParams
from ptq_tdq.timeaxis import lookup


class Known(Observed):
    """A table's intervals (scale and zero_point [T + 1]), with steps t [K] for what learns at some steps only.

    Each step finds its own interval; steps that share one, that in their middle. The ``histogram`` holds the squared
    distances [K, K] between the logarithms of the steps' scales, so that what pools steps adds them up. A table of
    ratios of tokens' intervals stands for these in the same way.
    """

    def __init__(self, t: Tensor, table: QParams, qtype: QType, choices: IntervalChoices) -> None:
        scale = lookup(table.scale, t)
        distances = Histogram((scale.log()[:, None] - scale.log()).square(), scale, scale, scale)
        super().__init__(len(table.scale) - 1, t, distances, qtype, choices=choices, ratios=distances)
        object.__setattr__(self, "_table", table)
        self._table: QParams

    def search(self, histogram: Histogram, zero_point: Tensor | None = None) -> QParams:
        best = histogram.counts.argmin(1)
        own = lookup(self._table.zero_point, self.t)[best]
        return QParams(histogram.centres[best], own if zero_point is None else zero_point.expand_as(own).to(own.dtype))

    @property
    def curve(self) -> QParams:
        """The table itself: what calibration smoothed need not be smoothed again."""
        return self._table
