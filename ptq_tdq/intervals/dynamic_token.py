"""``dynamic-token`` and its kin: each token has the interval of its own range at run time, times a ratio of t.

A token is a vector that the operation sums over: the channels of one place in a Linear's input, a row of q, of k and of
the softmax, a channel of v, the whole sample for a convolution. So its scale leaves the sum, and the products stay
products of integers. With lo = min(x, 0) and hi = max(x, 0) of the token,

    s = r(t) (hi - lo) / (qmax - qmin),    z = qmin - round(lo (qmax - qmin) / (hi - lo))

r = 1 clips nothing (Q-DiT, ViDiT-Q). A ratio below 1 clips the ends of every token by the same share, and what is worth
clipping changes with t and with the bits: r is learned as an interval of t is, and becomes a table as that does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ptq_tdq.intervals.base import IntervalSource, Observed, source_class
from ptq_tdq.intervals.dynamic import Dynamic, Form
from ptq_tdq.intervals.table import TableSource
from ptq_tdq.scheme import QType
from ptq_tdq.search import Histogram, QParams, vector_qparams

RATIO = "ratio"  # the name of the table r(t) among what is kept


class DynamicToken(Dynamic):
    """r = 1: no value is clipped."""

    pattern = "dynamic-token"
    by_token = True
    by_sample = False

    @classmethod
    def of(cls, qtype: QType) -> DynamicToken:
        """For codes of this type; nothing else has to be known."""
        return cls(torch.zeros((), dtype=torch.int32), qtype)

    def forward(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """``t`` [B] and tokens [B, ..., C] -> scale float32 and zero_point int32 [B, ...]."""
        found = vector_qparams(x.detach(), self.qtype)
        return found.scale, found.zero_point


class DynamicTokenRatio(DynamicToken):
    """r(t) from a source of the method ``inner``, which sees ratios where it would see intervals."""

    inner: ClassVar[str]

    def __init__(self, zero_point: Tensor, qtype: QType, ratio: IntervalSource) -> None:
        super().__init__(zero_point, qtype)
        self.ratio = ratio

    @classmethod
    def build(cls, method: str, observed: Observed) -> DynamicTokenRatio:
        """Starts at the ratios with the least error at each observed step."""
        assert observed.ratios is not None
        ratios = _ObservedRatios(
            observed.num_train_timesteps, observed.t, observed.ratios, observed.qtype, choices=observed.choices
        )
        ratio = source_class(cls.inner).build(cls.inner, ratios)
        return cls(observed.static.zero_point.clone(), observed.qtype, ratio)

    def forward(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        scale, zero_point = super().forward(t, x)
        ratio, _ = self.ratio(t, x)
        scale = scale * ratio.view(-1, *(1,) * (scale.ndim - 1))
        return scale.clamp(min=torch.finfo(torch.float32).tiny), zero_point

    def freeze(self, num_train_timesteps: int) -> None:
        self.ratio = TableSource(*self.ratio.table(num_train_timesteps))

    @property
    def generator(self) -> dict[str, Tensor]:
        """The table of ratios, once there is one."""
        return {RATIO: self.ratio.scale} if isinstance(self.ratio, TableSource) else {}

    @classmethod
    def form(cls, length: int) -> Form:
        return {RATIO: (torch.float32, (length,))}

    @classmethod
    def restore(cls, zero_point: Tensor, qtype: QType, generator: dict[str, Tensor]) -> DynamicTokenRatio:
        ratio = generator[RATIO]
        return cls(zero_point, qtype, TableSource(ratio, torch.zeros_like(ratio, dtype=torch.int32)))


class DynamicTokenStatic(DynamicTokenRatio):
    """One learned ratio for all t."""

    pattern = "dynamic-token-static"
    inner = "static"


class DynamicTokenTable(DynamicTokenRatio):
    """The best ratio of each observed step, not learned."""

    pattern = "dynamic-token-table"
    inner = "step-table"


class DynamicTokenTDQ(DynamicTokenRatio):
    """r(t) is the output of TDQ's module (the thin one)."""

    pattern = "dynamic-token-tdq"
    inner = "tdq-thin"


@dataclass(frozen=True)
class _ObservedRatios(Observed):
    """Ratios in the place of scales: ``histogram`` holds the error [K, F] at each step with each ratio [F]."""

    def search(self, histogram: Histogram, zero_point: Tensor | None = None) -> QParams:
        best = histogram.centres[histogram.counts.argmin(1)]
        return QParams(best, torch.zeros_like(best, dtype=torch.int32))
