"""The quantizer of one weight tensor, or of one channel range of it."""

from __future__ import annotations

import torch
from torch import Tensor

from ptq_tdq.affine import dequantize
from ptq_tdq.intervals.base import Float32Module
from ptq_tdq.rounding import AdaRound, LearnedCodes, LearnedWeight
from ptq_tdq.scheme import QType


class WeightQuantizer(Float32Module):
    """Codes of the weight's shape with one scale and zero_point per output channel [O] (or [1] per tensor).

    While ``rounding`` is set the weight is the soft, learned one; afterwards it comes from ``codes``.
    """

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.qtype = QType(bits)
        self.rounding: AdaRound | LearnedCodes | LearnedWeight | None = None
        self.register_buffer("codes", None, persistent=False)
        self.register_buffer("scale", None, persistent=False)
        self.register_buffer("zero_point", None, persistent=False)
        self.codes: Tensor | None
        self.scale: Tensor | None
        self.zero_point: Tensor | None

    def assign(self, codes: Tensor, scale: Tensor, zero_point: Tensor) -> None:
        """Set the final codes (integers), scale [O] or [1] and zero_point alike; learning ends."""
        self.rounding = None
        # tensors of their own: what moves them to a file and back takes no slices of others
        self.codes, self.scale = codes.to(torch.uint8).contiguous(), scale.contiguous()
        self.zero_point = zero_point.to(torch.int32).contiguous()

    def grid(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point, as they broadcast against the codes."""
        assert self.codes is not None and self.scale is not None and self.zero_point is not None
        shape = (-1, *(1,) * (self.codes.ndim - 1))
        return self.scale.view(shape), self.zero_point.view(shape)

    def holds(self, weight: Tensor) -> bool:
        """Whether a weight of any dtype is the one that the codes stand for: nearer than to other codes."""
        known = self.dequantized()
        apart = (weight.to(known.device, known.dtype) - known).abs()
        return bool((apart <= 0.51 * self.grid()[0]).all())

    def dequantized(self) -> Tensor:
        """The weight that the codes stand for."""
        assert self.codes is not None
        return dequantize(self.codes.to(torch.int32), *self.grid())
