"""``static`` (S_1, Q-Diffusion) and ``S_N``: N learned intervals, each for an Nth of the time axis (supp s5)."""

from __future__ import annotations

import torch
from torch import Tensor

from ptq_tdq.intervals.base import IntervalSource, LearnedScale, Observed


class BinnedIntervals(IntervalSource):
    """Scale [N] learned and zero_point [N]; time bin n covers t in [n T / N, (n + 1) T / N)."""

    pattern = r"static|S_([1-9][0-9]{0,3})"

    def __init__(self, scale: Tensor, zero_point: Tensor, num_train_timesteps: int, parameter: str) -> None:
        super().__init__()
        self.num_train_timesteps = num_train_timesteps
        self.scale = LearnedScale(scale, parameter)
        self.register_buffer("zero_point", zero_point)
        self.zero_point: Tensor

    @classmethod
    def build(cls, method: str, observed: Observed) -> BinnedIntervals:
        """The best interval of each bin's pooled samples; a bin that calibration never visited copies its nearest."""
        bins = 1 if method == "static" else int(method.removeprefix("S_"))
        total = observed.num_train_timesteps
        group = _bin(observed.t, bins, total)
        visited = group.unique()
        centre = (torch.arange(bins) + 0.5)[:, None]
        nearest = ((visited + 0.5)[None] - centre).abs().argmin(1)
        pooled = observed.histogram.pooled(torch.searchsorted(visited, group), len(visited))
        found = observed.intervals(pooled) if len(visited) > 1 else observed.static
        return cls(
            found.scale.reshape(-1)[nearest],
            found.zero_point.reshape(-1)[nearest],
            total,
            observed.choices.interval_parameter,
        )

    def forward(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        index = _bin(t, len(self.zero_point), self.num_train_timesteps)
        return self.scale()[index], self.zero_point[index]


def _bin(t: Tensor, bins: int, total: int) -> Tensor:
    return (t.double() * bins / total).floor().long().clamp(0, bins - 1)
