"""``dynamic``: the interval from each sample's own absolute maximum at run time (supp Table 1, variant a)."""

from __future__ import annotations

import torch
from torch import Tensor

from ptq_tdq.intervals.base import IntervalSource, Observed
from ptq_tdq.scheme import QType


class Dynamic(IntervalSource):
    """The least scale at which no value of the sample is clipped, with the zero point of the static interval.

    For a symmetric zero point this is abs-max; values on a side that the zero point leaves no codes for are clipped.
    """

    pattern = "dynamic"
    timed = False

    def __init__(self, zero_point: Tensor, qtype: QType) -> None:
        super().__init__()
        self.qtype = qtype
        self.register_buffer("zero_point", zero_point)
        self.zero_point: Tensor

    @classmethod
    def build(cls, method: str, observed: Observed) -> Dynamic:
        return cls(observed.static.zero_point.clone(), observed.qtype)  # one tensor in two places cannot be saved

    def forward(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        rows = x.flatten(1)
        above, below = self.qtype.qmax - self.zero_point, self.zero_point - self.qtype.qmin
        up = rows.amax(1) / above if above > 0 else torch.zeros(len(rows))
        down = -rows.amin(1) / below if below > 0 else torch.zeros(len(rows))
        scale = torch.maximum(up, down).to(torch.float32).clamp(min=torch.finfo(torch.float32).tiny)
        return scale, self.zero_point.expand(len(rows))
