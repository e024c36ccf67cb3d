"""A finished interval table: what every time-dependent source becomes after calibration."""

from __future__ import annotations

from torch import Tensor

from ptq_tdq.intervals.base import IntervalSource, Observed
from ptq_tdq.timeaxis import lookup


class TableSource(IntervalSource):
    """Scale float32 [T + 1] and zero_point int32 [T + 1], looked up by t."""

    def __init__(self, scale: Tensor, zero_point: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("zero_point", zero_point, persistent=False)
        self.scale: Tensor
        self.zero_point: Tensor

    @classmethod
    def build(cls, method: str, observed: Observed) -> TableSource:
        """The best interval of each observed step, spread over the axis; not learned."""
        return cls(observed.spread(observed.steps.scale), observed.spread(observed.steps.zero_point))

    def forward(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return lookup(self.scale, t), lookup(self.zero_point, t)
