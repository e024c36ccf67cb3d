"""Rounding of a weight in closed form: GPTQ (arXiv 2210.17323), for inputs that are already quantized.

A layer W [O, K] is to give the outputs W x with quantized weights W_hat and the inputs x_hat [K] that the quantized
layers before it have left. With H = E[x_hat x_hat^T] and C = E[W (x - x_hat) x_hat^T] (about the means where a bias may
follow, which then takes up the difference of the means) its squared error is, but for a constant,

    tr((W* - W_hat) H (W* - W_hat)^T)    with    W* = W + C H^-1.

GPTQ rounds W* one input channel after another; what a channel loses is made up for by those that are still free.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ptq_tdq.scheme import QType

BLOCK = 64  # columns whose updates are applied to all later ones at once
DAMPING = 0.01  # of GPTQ's own inverse, as published


def damped(hessian: Tensor, damping: float) -> Tensor:
    """``hessian`` [K, K] plus ``damping`` times the mean of its diagonal."""
    mean = hessian.diagonal().mean()
    result = hessian.clone()
    result.diagonal().add_(torch.where(mean > 0, damping * mean, 1.0))  # inputs that never vary leave nothing to solve
    return result


def compensated(weight: Tensor, hessian: Tensor, cross: Tensor, damping: float) -> Tensor:
    """``W*`` [O, K], with H damped; ``cross`` [O, K] is C."""
    factor = torch.linalg.cholesky(damped(hessian, damping))
    return weight + torch.cholesky_solve(cross.t(), factor).t()


def solve_order(hessian: Tensor) -> tuple[Tensor, Tensor]:
    """The order of the columns [K] (falling H_kk), and the upper Cholesky factor of H's inverse in that order."""
    order = hessian.diagonal().argsort(descending=True, stable=True)
    factor = torch.linalg.cholesky(damped(hessian[order[:, None], order], DAMPING))
    return order, torch.linalg.cholesky(torch.cholesky_inverse(factor), upper=True)


def gptq(weight: Tensor, order: Tensor, upper: Tensor, scale: Tensor, zero_point: Tensor, qtype: QType) -> Tensor:
    """Codes (float, whole numbers) [R, K] of ``weight`` [R, K]; ``order`` and ``upper`` are from :func:`solve_order`.

    ``scale`` and ``zero_point`` [R, K] may differ between columns. A diagonal H gives rounding to nearest.
    """
    w, s, z = (v[:, order].t().contiguous() for v in (weight, scale, zero_point.to(weight.dtype)))
    codes = torch.empty_like(w)
    for start in range(0, len(w), BLOCK):
        stop = min(start + BLOCK, len(w))
        inner, block, errors = upper[start:stop, start:stop], w[start:stop], torch.empty_like(w[start:stop])
        for i, k in enumerate(range(start, stop)):
            codes[k] = torch.round(block[i] / s[k]).add_(z[k]).clamp_(qtype.qmin, qtype.qmax)
            errors[i] = (block[i] - (codes[k] - z[k]) * s[k]) / inner[i, i]
            block[i + 1 :].addmm_(inner[i, i + 1 :, None], errors[i, None], alpha=-1)
        w[stop:].addmm_(upper[start:stop, stop:].t(), errors, alpha=-1)
    result = torch.empty_like(codes)
    result[order] = codes
    return result.t().contiguous()


def layer_error(difference: Tensor, hessian: Tensor) -> Tensor:
    """``d H d^T`` of each row d of ``difference`` [R, K]: [R]."""
    return ((difference @ hessian) * difference).sum(1)
