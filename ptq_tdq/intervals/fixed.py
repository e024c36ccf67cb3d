"""``fixed``: one interval that is not learned and clips nothing that calibration saw: the one for x_t itself.

Clipping x_t repeats at the same places at each step and adds up along the trajectory, so the choice ``fixed_layers``
gives the first layer this source whatever the method. (Preset ``default`` goes further: x_t is not quantized at all.)
"""

from __future__ import annotations

from torch import Tensor

from ptq_tdq.intervals.base import IntervalSource, Observed

MARGIN = 1.1  # the noise of other seeds has longer tails than that of the calibration set


class Fixed(IntervalSource):
    """The observed range over all steps, widened by :data:`MARGIN`."""

    pattern = "fixed"

    def __init__(self, scale: Tensor, zero_point: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point)
        self.scale: Tensor
        self.zero_point: Tensor

    @classmethod
    def build(cls, method: str, observed: Observed) -> Fixed:
        return cls(observed.static.scale * MARGIN, observed.static.zero_point)

    def forward(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.scale.expand(len(t)), self.zero_point.expand(len(t))
