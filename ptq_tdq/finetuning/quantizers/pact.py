"""``pact``: parametrized clipping (arXiv 1805.06085)."""

from __future__ import annotations

from torch import Tensor

from ptq_tdq.affine import fake_quantize
from ptq_tdq.finetuning.quantizers.base import Quantizer, ends, with_gradient_of
from ptq_tdq.scheme import QType

DECAY = 1e-4  # of alpha; the paper takes that of the weights


class PACT(Quantizer):
    """The scale learns from clipped values alone, and is drawn to 0.

    y = clip(x, 0, alpha) is rounded, and d y / d alpha = 1 where x >= alpha, else 0 (equations 1 and 3). Here the range
    has two ends, s (qmin - z) and s (qmax - z): behind a ReLU they are 0 and alpha.
    """

    name = "pact"

    def __call__(self, x: Tensor, scale: Tensor, zero_point: Tensor, qtype: QType) -> Tensor:
        low, high = ends(scale, zero_point, qtype)
        self.penalty = DECAY * (low.square() + high.square()).mean()
        clipped = x.clamp(low.to(x.dtype), high.to(x.dtype))
        return with_gradient_of(clipped, fake_quantize(x, scale, zero_point, qtype).detach())
