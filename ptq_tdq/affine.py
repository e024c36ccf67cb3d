"""Affine quantization in the ONNX form, as pure tensor functions (method: ONNX QuantizeLinear / DequantizeLinear).

    q     = clamp(round_half_even(x / s) + z, qmin, qmax)
    x_hat = s (q - z)

Scale s (float32, > 0) and zero_point z (integer values) broadcast against x. Note that torch's own fake_quantize
multiplies by 1 / s and differs in rare ties by one level; the division here is the reference.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ptq_tdq.native.affine import grid_of
from ptq_tdq.scheme import QType


def choose_qparams(lo: Tensor, hi: Tensor, qtype: QType) -> tuple[Tensor, Tensor]:
    """Scale and zero_point whose range is [lo, hi], widened to contain 0; both have the shape of ``lo``.

    0 is always exactly representable. A range of width 0 gets the smallest normal scale.
    """
    lo, hi = lo.clamp(max=0.0), hi.clamp(min=0.0)
    tiny = torch.finfo(torch.float32).tiny
    scale = ((hi - lo) / (qtype.qmax - qtype.qmin)).to(torch.float32).clamp(min=tiny)
    zero_point = (qtype.qmin - torch.round(lo / scale)).clamp(qtype.qmin, qtype.qmax)
    return scale, zero_point.to(torch.int32)


def end_scales(lo: Tensor, hi: Tensor, zero_point: Tensor, qtype: QType) -> tuple[Tensor, Tensor]:
    """The least scales at which codes reach ``lo``, and ``hi``, from a given zero point; 0 on a side without codes."""
    # dividing by infinity asks the device nothing, unlike a condition
    down, up = (
        end.to(torch.float32) / torch.where(codes > 0, codes.to(torch.float32), torch.inf)
        for end, codes in ((-lo, zero_point - qtype.qmin), (hi, qtype.qmax - zero_point))
    )
    return down, up


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, qtype: QType) -> Tensor:
    """Integer codes of ``x`` (int32, the shape of x)."""
    u = x.to(scale.dtype) / scale  # a 0-dim scale alone would not promote a low-precision x
    return (torch.round(u) + zero_point).clamp_(qtype.qmin, qtype.qmax).to(torch.int32)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Real values ``scale * (codes - zero_point)`` in the dtype of ``scale``."""
    return (codes - zero_point).to(scale.dtype) * scale


class _FakeQuantize(torch.autograd.Function):
    """Quantize and dequantize in one node, with LSQ gradients (arXiv 1902.08153, equations 3 and 5)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, factor: float | None
    ) -> Tensor:
        ctx.factor, kept = factor, ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        ctx.grid = grid = grid_of(x, scale, zero_point, qmin, qmax)
        if grid is not None:
            y, u = grid.fake_quantize(x, scale, zero_point, kept)
            ctx.save_for_backward(u, scale, zero_point)
            return y
        u = x.to(scale.dtype) / scale  # a 0-dim scale alone would not promote a low-precision x
        level = torch.round(u) if kept else u.round_()  # new memory takes as long as several operations
        # bounds that are numbers: clamping between tensors takes several times as long
        level = level.add_(zero_point).clamp_(qmin, qmax).sub_(zero_point)
        if not kept:
            return level.mul_(scale).to(x.dtype)
        ctx.save_for_backward(u, scale, level)
        return (level * scale).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        u, scale, other = ctx.saved_tensors  # other: zero points for C, else what was rounded and clamped
        if ctx.grid is not None:  # both in one pass
            of_x, of_scale = ctx.grid.gradients(u, scale, other, grad)
        else:
            residual = other - u
            outside = residual.abs() > 0.5
            of_x = grad.masked_fill(outside, 0.0) if ctx.needs_input_grad[0] else None
            of_scale = None
            if ctx.needs_input_grad[1]:
                # d x_hat / d s = round(x/s) - x/s inside the range, qmin - z or qmax - z outside
                of_scale = torch.where(outside, other, residual).mul_(grad).sum_to_size(scale.shape)
        if of_scale is not None and ctx.factor is not None:
            of_scale = of_scale * ctx.factor
        return of_x, of_scale, None, None, None, None


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, qtype: QType, *, factor: float | None = None) -> Tensor:
    """``dequantize(quantize(x))`` with gradients: straight-through for x inside the range (0 outside), LSQ for scale.

    ``scale`` and ``zero_point`` broadcast against x: [] per tensor, [O, 1, 1, 1] per output channel, [B, 1, 1, 1] per
    sample. The scale's gradient is multiplied by ``factor``, and none reaches zero_point. NaN stays NaN. The arithmetic
    is that of ``scale`` (float32), the result has the dtype of x.
    """
    return _FakeQuantize.apply(x, scale, zero_point.to(scale.dtype), qtype.qmin, qtype.qmax, factor)  # type: ignore[no-any-return, no-untyped-call]


def learned_step_size(x: Tensor, scale: Tensor, zero_point: Tensor, qtype: QType) -> Tensor:
    """:func:`fake_quantize` with the scale's gradient times ``1 / sqrt(n qmax)``, n values to a scale (LSQ, 2.2)."""
    return fake_quantize(x, scale, zero_point, qtype, factor=(x.numel() / scale.numel() * qtype.qmax) ** -0.5)
