"""``dynamic-statistics`` and ``dynamic-statistics-time``: the interval that a network reads from each tensor's
statistics at run time, and from the time step too (supp Table 1, variants b and c).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ptq_tdq.intervals.base import Observed
from ptq_tdq.intervals.dynamic import Dynamic
from ptq_tdq.intervals.mlp import scale_of, start
from ptq_tdq.intervals.tdq import DIMENSION, TimeEncoding, initialize, make_net
from ptq_tdq.scheme import QType

STATISTICS = 4


class DynamicStatistics(Dynamic):
    """``scale = softplus(net(statistics))`` with the net of ``tdq`` and the zero point of the static interval.

    The statistics are minimum, maximum, mean and standard deviation of each sample, as multiples of ``unit``, the
    length of the static range (which ones the paper takes is open). It starts as ``tdq`` does, on the statistics of
    each observed step's pooled samples.
    """

    pattern = "dynamic-statistics"
    extra = 0  # features beside the statistics

    def __init__(self, zero_point: Tensor, qtype: QType) -> None:
        super().__init__(zero_point, qtype)
        self.net = make_net(STATISTICS + self.extra)
        self.register_buffer("unit", torch.ones(()))
        self.unit: Tensor

    @classmethod
    def build(cls, method: str, observed: Observed) -> DynamicStatistics:
        # the zero point is the static one, so the steps' best scales must be those beside it
        observed = replace(observed, options=replace(observed.options, zero_point="fixed"))
        source = cls(observed.static.zero_point.clone(), observed.qtype)
        source.unit.copy_(observed.static.scale * (observed.qtype.qmax - observed.qtype.qmin))
        initialize(source.net, observed.options.weights)
        h = observed.histogram
        share = h.counts / h.counts.sum(1, keepdim=True)
        mean = share @ h.centres
        deviation = (share @ h.centres.square() - mean.square()).clamp(min=0).sqrt()
        start(source.net, source.features(observed.t, torch.stack([h.lo, h.hi, mean, deviation], 1)), observed)
        return source

    def forward(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        rows = x.detach().flatten(1).float()
        deviation, mean = torch.std_mean(rows, 1, correction=0)
        statistics = torch.stack([rows.amin(1), rows.amax(1), mean, deviation], 1)
        return scale_of(self.net, self.features(t, statistics)), self.zero_point.expand(len(rows))

    def features(self, t: Tensor, statistics: Tensor) -> Tensor:
        """``t`` [B] and ``statistics`` [B, 4] -> what the net is given, [B, d]."""
        return statistics.float() / self.unit


class DynamicStatisticsTime(DynamicStatistics):
    """The statistics and the frequency encoding of t."""

    pattern = "dynamic-statistics-time"
    extra = DIMENSION

    def __init__(self, zero_point: Tensor, qtype: QType) -> None:
        super().__init__(zero_point, qtype)
        self.encode = TimeEncoding("frequency", 1)  # which does not depend on the length of the axis

    def features(self, t: Tensor, statistics: Tensor) -> Tensor:
        return torch.cat([super().features(t, statistics), self.encode(t)], 1)
