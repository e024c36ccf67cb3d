"""Rounding of a weight in closed form: GPTQ (arXiv 2210.17323), for inputs that are already quantized.

A layer W [O, K] is to give the outputs W x with quantized weights W_hat and the inputs x_hat [K] that the quantized
layers before it have left. With H = E[x_hat x_hat^T] and C = E[W (x - x_hat) x_hat^T] (about the means where a bias may
follow, which then takes up the difference of the means) its squared error is, but for a constant,

    tr((W* - W_hat) H (W* - W_hat)^T)    with    W* = W + C H^-1.

GPTQ rounds W* one input channel after another; what a channel loses is made up for by those that are still free.

Both solve with the inputs' correlations, H = D R D with D = diag(sqrt(H_kk)), and damp R: so a channel in other units
(x_k larger, W_k smaller) changes nothing, one huge channel does not drown the others, and R + damping I can be factored
for every positive semidefinite H. A channel that never varies is one that correlates with nothing. Everything here is
float64, whose exponents hold the squares of all that float32 holds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ptq_tdq.scheme import QType

BLOCK = 64  # columns whose updates are applied to all later ones at once
DAMPING = 0.01  # of GPTQ's own inverse, as published


def correlations(hessian: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """``R + damping I`` [K, K] and the diagonal of D [K], 1 where H_kk is 0; both float64."""
    hessian = hessian.double()
    size = hessian.diagonal().clamp(min=0).sqrt()
    size = torch.where(size > 0, size, 1.0)
    result = hessian / size[:, None] / size
    result.fill_diagonal_(1 + damping)
    return result, size


def compensated(weight: Tensor, hessian: Tensor, cross: Tensor, damping: float) -> Tensor:
    """``W*`` [O, K] (float64), with H damped; ``cross`` [O, K] is C."""
    correlation, size = correlations(hessian, damping)
    factor = torch.linalg.cholesky(correlation)
    change = torch.cholesky_solve((cross.double() / size).t(), factor).t() / size
    return weight.double() + change


def solve_order(hessian: Tensor) -> tuple[Tensor, Tensor]:
    """The order of the columns [K] (falling H_kk), and the upper Cholesky factor of H's inverse in that order."""
    order = hessian.diagonal().argsort(descending=True, stable=True)
    correlation, size = correlations(hessian[order[:, None], order], DAMPING)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(correlation))
    return order, torch.linalg.cholesky(inverse, upper=True) / size


def nearest(weight: Tensor, scale: Tensor, zero_point: Tensor, qtype: QType) -> Tensor:
    """Codes (float64, whole numbers) of ``weight``, each rounded alone; all shapes are equal."""
    return torch.round(weight.double() / scale).add_(zero_point).clamp_(qtype.qmin, qtype.qmax)


def gptq(weight: Tensor, order: Tensor, upper: Tensor, scale: Tensor, zero_point: Tensor, qtype: QType) -> Tensor:
    """Codes (float64, whole numbers) [R, K] of ``weight`` [R, K]; ``order``, ``upper`` are from :func:`solve_order`.

    ``scale`` and ``zero_point`` [R, K] may differ between columns. A diagonal H gives rounding to nearest. Where no
    code is clipped, the error in the damped H is at most ``sum_k (s_k / 2 U_kk)^2`` (Babai's nearest plane), U being
    ``upper``. That bounds the loss; it does not make each row better than :func:`nearest`.
    """
    w, s, z = (v[:, order].t().double().contiguous() for v in (weight, scale, zero_point))
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
    """``d H d^T`` of each row d of ``difference`` [R, K]: [R], float64."""
    difference = difference.double()
    return ((difference @ hessian.double()) * difference).sum(1)
