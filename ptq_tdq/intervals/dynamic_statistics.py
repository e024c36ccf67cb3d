"""``dynamic-statistics`` and ``dynamic-statistics-time``: the interval that a network reads from each tensor's
statistics at run time, and from the time step too (supp Table 1, variants b and c).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ptq_tdq.intervals.base import Observed
from ptq_tdq.intervals.dynamic import Dynamic
from ptq_tdq.intervals.mlp import centre, fit, scale_of
from ptq_tdq.intervals.tdq import DIMENSION, TimeEncoding, initialize, make_net
from ptq_tdq.scheme import QType

STATISTICS = 4
RIDGE = 1e-2  # of the fit to statistics of pooled samples, which are not quite those of one


class DynamicStatistics(Dynamic):
    """The interval of ``tdq`` with statistics in the place of t, and the zero point of the static interval.

    The statistics are minimum, maximum, mean and variance of each sample (supp Table 1), in units of ``unit``, the
    length of the static range (of its square for the variance). It starts as ``tdq`` does, on the statistics of
    each observed step's pooled samples.
    """

    pattern = "dynamic-statistics"
    extra = 0  # features beside the statistics

    def __init__(self, zero_point: Tensor, qtype: QType) -> None:
        super().__init__(zero_point, qtype)
        self.net = make_net(STATISTICS + self.extra)
        self.register_buffer("unit", torch.ones(()))
        self.register_buffer("static", torch.ones(()))
        self.unit: Tensor
        self.static: Tensor

    @classmethod
    def build(cls, method: str, observed: Observed) -> DynamicStatistics:
        # the zero point is the static one, so the steps' best scales must be those beside it
        observed = replace(observed, choices=replace(observed.choices, zero_point="fixed"))
        source = cls(observed.static.zero_point.clone(), observed.qtype)
        source.static.copy_(observed.static.scale)
        source.unit.copy_(observed.static.scale * (observed.qtype.qmax - observed.qtype.qmin))
        initialize(source.net, observed.choices.module_weights)
        h = observed.histogram
        share = h.counts / h.counts.sum(1, keepdim=True)
        mean = share @ h.centres
        variance = (share @ h.centres.square() - mean.square()).clamp(min=0)
        features = source.features(observed.t, torch.stack([h.lo, h.hi, mean, variance], 1))
        centre(source.net, features, silent=observed.choices.module_start == "static")
        if observed.choices.module_start == "steps":
            fit(source.net, features, source.static, observed.steps.scale, RIDGE)
        return source

    def forward(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        rows = x.detach().flatten(1).float()
        variance, mean = torch.var_mean(rows, 1, correction=0)
        statistics = torch.stack([rows.amin(1), rows.amax(1), mean, variance], 1)
        return scale_of(self.net, self.features(t, statistics), self.static), self.zero_point.expand(len(rows))

    def features(self, t: Tensor, statistics: Tensor) -> Tensor:
        """``t`` [B] and ``statistics`` [B, 4] -> what the net is given, [B, d]."""
        return statistics.float() / torch.stack([self.unit, self.unit, self.unit, self.unit.square()])


class DynamicStatisticsTime(DynamicStatistics):
    """The statistics and the frequency encoding of t."""

    pattern = "dynamic-statistics-time"
    extra = DIMENSION

    def __init__(self, zero_point: Tensor, qtype: QType) -> None:
        super().__init__(zero_point, qtype)
        self.encode = TimeEncoding("frequency", 1)  # which does not depend on the length of the axis

    def features(self, t: Tensor, statistics: Tensor) -> Tensor:
        return torch.cat([super().features(t, statistics), self.encode(t)], 1)
