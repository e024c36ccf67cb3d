"""AdaRound: learned rounding of weights (Nagel et al., arXiv 2004.10568), with the rectified sigmoid of section 3.2."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ptq_tdq.fused import power_sum, rectified_sigmoid
from ptq_tdq.scheme import QType

ZETA, GAMMA = 1.1, -0.1


class AdaRound(nn.Module):
    """Codes ``floor(w / s) + h(alpha) + z`` where h in [0, 1] is learned for each weight.

    At the start h is the fractional part of w / s, so the soft weights equal the original ones inside the range.
    ``weight`` has any shape; ``scale`` (float32) and ``zero_point`` broadcast against it.
    """

    def __init__(self, weight: Tensor, scale: Tensor, zero_point: Tensor, qtype: QType) -> None:
        super().__init__()
        self.qtype = qtype
        u = weight.detach() / scale
        fraction = (u - u.floor() - GAMMA) / (ZETA - GAMMA)
        self.alpha = nn.Parameter(torch.logit(fraction))
        self.base = u.floor() + zero_point
        low, high = (codes.clamp(qtype.qmin, qtype.qmax) for codes in (self.base, self.base + 1))
        self.low = (low - zero_point) * scale  # the weight rounded down, and what rounding up adds to it
        self.step = (high - low) * scale

    def h(self) -> Tensor:
        """The soft rounding decisions, the shape of the weight, in [0, 1]."""
        return rectified_sigmoid(self.alpha, ZETA, GAMMA)

    def soft_weight(self) -> Tensor:
        """Differentiable weights with the current soft decisions."""
        return torch.addcmul(self.low, self.step, self.h())

    def hard_codes(self) -> Tensor:
        """Final codes (int32): round up where h >= 1/2."""
        up = (self.alpha.detach() >= 0).to(self.base.dtype)
        return (self.base + up).clamp(self.qtype.qmin, self.qtype.qmax).to(torch.int32)

    def regularizer(self, b: float) -> Tensor:
        """``sum(1 - |2 h - 1|^b)``, which drives each h to 0 or 1 as b falls (equation 24)."""
        return self.alpha.numel() - power_sum(2 * self.h() - 1, b)


def annealed_b(progress: float, *, warmup: float, start: float, end: float) -> float | None:
    """The exponent b at ``progress`` in [0, 1]: None during warm-up, then a linear fall from start to end."""
    if progress < warmup:
        return None
    return end + (start - end) * max(0.0, 1 - (progress - warmup) / (1 - warmup))
