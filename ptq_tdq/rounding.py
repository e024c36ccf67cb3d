"""Learned rounding of weights: AdaRound (Nagel et al., arXiv 2004.10568), and codes or weights learned from codes
that are good.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ptq_tdq.affine import learned_step_size, quantize
from ptq_tdq.fused import power_sum, rectified_sigmoid, straight_through
from ptq_tdq.scheme import QType

ZETA, GAMMA = 1.1, -0.1
NEAR = 0.49  # of a step: what rounds to the same code
INNER = 0.1  # of a step: 0.49 begins with a loss that is a third higher after 40 iterations at 2 bits


class AdaRound(nn.Module):
    """Codes ``floor(w / s) + h(alpha) + z`` where h in [0, 1] (section 3.2) is learned for each weight.

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
        self._h, self._at = torch.empty(0), (-1, False)

    def h(self) -> Tensor:
        """The soft rounding decisions, the shape of the weight, in [0, 1]; computed once between two steps of alpha."""
        now = self.alpha._version, torch.is_grad_enabled()
        if now != self._at:
            self._h, self._at = rectified_sigmoid(self.alpha, ZETA, GAMMA), now
        return self._h

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


class _LearnedScale(nn.Module):
    """What is rounded with a scale that is learned as a logarithm, and with a zero point that stays."""

    def __init__(self, scale: Tensor, zero_point: Tensor, qtype: QType) -> None:
        super().__init__()
        self.qtype, self.first_scale, self.zero_point = qtype, scale, zero_point.to(scale.dtype)
        self.log_scale = nn.Parameter(torch.zeros_like(scale))  # of what the scale has grown by

    def scale(self) -> Tensor:
        """The scale as it is now, never subnormal: some threads flush such numbers to 0."""
        return (self.first_scale * self.log_scale.exp()).clamp(min=torch.finfo(torch.float32).tiny)


class LearnedCodes(_LearnedScale):
    """Codes and scales that are learned by straight-through gradients, from given ones (LSQ, arXiv 1902.08153).

    Each weight has a position on its grid, which is rounded to its code. At the start that is where the original weight
    lies, as near to it as its given ``codes`` allow: these are kept, and close calls change first. Each state is one of
    codes, so nothing is lost when learning stops. ``weight`` and ``codes`` have any shape; ``scale`` (float32) and
    ``zero_point`` broadcast against it.
    """

    def __init__(self, weight: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor, qtype: QType) -> None:
        super().__init__(scale, zero_point, qtype)
        given = codes.to(scale.dtype)
        offset = weight.detach() / scale + self.zero_point - given
        self.position = nn.Parameter(given + offset.clamp(-NEAR, NEAR))

    def soft_weight(self) -> Tensor:
        """Differentiable weights: those of the present codes."""
        return straight_through(self.position, self.scale(), self.zero_point, self.qtype.qmin, self.qtype.qmax)

    def hard_codes(self) -> Tensor:
        """The present codes (int32)."""
        return self.position.detach().round().clamp(self.qtype.qmin, self.qtype.qmax).to(torch.int32)


class LearnedWeight(_LearnedScale):
    """A weight and its scales that are learned by LSQ (arXiv 1902.08153), from given codes.

    At the start the ``weight`` (any shape) is moved near the middle of the cells of its ``codes``: nearest rounding
    gives these, and the first steps do not undo what others have rounded for. ``scale`` (float32) and ``zero_point``
    broadcast against it.
    """

    def __init__(self, weight: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor, qtype: QType) -> None:
        super().__init__(scale, zero_point, qtype)
        level = codes.to(scale.dtype) - self.zero_point
        offset = weight.detach() / scale - level
        self.weight = nn.Parameter(scale * (level + offset.clamp(-INNER, INNER)))

    def soft_weight(self) -> Tensor:
        """Differentiable weights: those of the present codes."""
        return learned_step_size(self.weight, self.scale(), self.zero_point, self.qtype)

    def hard_codes(self) -> Tensor:
        """The present codes (int32)."""
        return quantize(self.weight.detach(), self.scale().detach(), self.zero_point, self.qtype)


def annealed_b(progress: float, *, warmup: float, start: float, end: float) -> float | None:
    """The exponent b at ``progress`` in [0, 1]: None during warm-up, then a linear fall from start to end."""
    if progress < warmup:
        return None
    return end + (start - end) * max(0.0, 1 - (progress - warmup) / (1 - warmup))
