"""``step-lsq``: one learned interval per sampling step (TALSQ of EfficientDM, arXiv 2310.03270)."""

from __future__ import annotations

from torch import Tensor

from ptq_tdq.intervals.base import IntervalSource, LearnedScale, Observed
from ptq_tdq.timeaxis import between, lookup


class StepLSQ(IntervalSource):
    """Scale [K] learned at the observed steps t [K], linear in t between them and constant beyond; zero_point [T]."""

    pattern = "step-lsq"

    def __init__(self, t: Tensor, scale: Tensor, zero_point: Tensor, parameter: str) -> None:
        super().__init__()
        self.scale = LearnedScale(scale, parameter)
        self.register_buffer("t", t)
        self.register_buffer("zero_point", zero_point)
        self.t: Tensor
        self.zero_point: Tensor

    @classmethod
    def build(cls, method: str, observed: Observed) -> StepLSQ:
        zero_point = observed.spread(observed.steps.zero_point)
        return cls(observed.t, observed.steps.scale, zero_point, observed.choices.interval_parameter)

    def forward(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return between(self.scale(), self.t, t), lookup(self.zero_point, t)
