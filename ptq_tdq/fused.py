"""Autograd nodes that do in few passes over memory what composed operators do in many."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def power_sum(x: Tensor, power: float) -> Tensor:
    """``sum(|x|^power)``, at least in float32; powers above 1 only, since the gradient at 0 is taken as 0."""
    return _PowerSum.apply(x, power)  # type: ignore[no-any-return, no-untyped-call]


def rectified_sigmoid(alpha: Tensor, zeta: float, gamma: float) -> Tensor:
    """``clamp(sigmoid(alpha) (zeta - gamma) + gamma, 0, 1)`` (AdaRound, equation 23)."""
    return _RectifiedSigmoid.apply(alpha, zeta, gamma)  # type: ignore[no-any-return, no-untyped-call]


def straight_through(position: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    """``scale (clamp(round(position), qmin, qmax) - zero_point)``; the gradient passes the rounding and the clamp.

    ``scale`` and ``zero_point`` (of the scale's dtype) broadcast against ``position``.
    """
    return _StraightThrough.apply(position, scale, zero_point, qmin, qmax)  # type: ignore[no-any-return, no-untyped-call]


class _PowerSum(torch.autograd.Function):
    """One power serves the value and the gradient; powers take longer than all else in a loss."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, power: float) -> Tensor:
        size = x.abs()
        slope = size if power == 2 else size.pow(power - 1)
        ctx.power = power
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(torch.copysign(slope, x))
        return (slope * size).sum(dtype=torch.promote_types(size.dtype, torch.float32))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (slope,) = ctx.saved_tensors
        return slope * (grad * ctx.power).to(slope.dtype), None


class _RectifiedSigmoid(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, alpha: Tensor, zeta: float, gamma: float) -> Tensor:
        sigma = torch.sigmoid(alpha)
        stretched = sigma * (zeta - gamma)
        stretched += gamma
        if ctx.needs_input_grad[0]:
            slope = (1 - sigma).mul_(sigma).mul_(zeta - gamma)
            ctx.save_for_backward(slope.masked_fill_((stretched < 0) | (stretched > 1), 0.0))
        return stretched.clamp_(0.0, 1.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return grad * slope, None, None


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, position: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
        level = torch.round(position).clamp_(qmin, qmax).sub_(zero_point)
        ctx.save_for_backward(level, scale)
        return level * scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        level, scale = ctx.saved_tensors
        return grad * scale, (level * grad).sum_to_size(scale.shape), None, None, None
