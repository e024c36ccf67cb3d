"""Rounding of a weight in closed form: GPTQ (arXiv 2210.17323), for inputs that are already quantized.

A layer W [O, K] is to give the outputs W x with quantized weights W_hat and the inputs x_hat [K] that the quantized
layers before it have left. With H = E[x_hat x_hat^T] and C = E[W (x - x_hat) x_hat^T] (about the means where a bias may
follow, which then takes up the difference of the means) its squared error is, but for a constant,

    tr((W* - W_hat) H (W* - W_hat)^T)    with    W* = W + C H^-1.

GPTQ rounds W* one input channel after another; what a channel loses is made up for by those that are still free. With
H = L L^T the error of a row is |L^T d|^2, d = W* - W_hat, so from the last channel to the first each one can cancel
what the channels behind it have left in its own term (Babai's nearest plane). One factorization serves all rows.

Both solve with the inputs' correlations, H = D R D with D = diag(sqrt(H_kk)), and damp R: so a channel in other units
(x_k larger, W_k smaller) changes nothing, one huge channel does not drown the others, and R + damping I can be factored
for every positive semidefinite H. A channel that never varies is one that correlates with nothing. Everything here is
float64, whose exponents hold the squares of all that float32 holds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ptq_tdq.scheme import QType

BLOCK = 128  # columns that take over at once what all columns behind them have left
DAMPING = 0.01  # of GPTQ's own factor, as published


def correlations(hessian: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """``R + damping I`` [K, K] and the diagonal of D [K], 1 where H_kk is 0; both float64."""
    hessian = hessian.double()
    size = hessian.diagonal().clamp(min=0).sqrt()
    size = torch.where(size > 0, size, 1.0)
    result = hessian / size[:, None]
    result /= size
    result.fill_diagonal_(1 + damping)
    return result, size


def compensated(weight: Tensor, hessian: Tensor, cross: Tensor, damping: float) -> Tensor:
    """``W*`` [O, K] (float64), with H damped; ``cross`` [O, K] is C."""
    correlation, size = correlations(hessian, damping)
    factor = torch.linalg.cholesky(correlation)
    change = torch.cholesky_solve((cross.double() / size).t(), factor).t() / size
    return weight.double() + change


def solve_order(hessian: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The order of the columns [K] (rising H_kk); in it the lower Cholesky factor [K, K] of the damped H, and what
    damping has added to its diagonal [K].
    """
    order = hessian.diagonal().argsort(descending=True, stable=True).flip(0)
    correlation, size = correlations(hessian[order[:, None], order], DAMPING)
    added = correlation.diagonal() * size.square() - hessian.diagonal()[order]
    return order, torch.linalg.cholesky(correlation).mul_(size[:, None]), added


def absorbed(cross: Tensor, solve: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """``C H^-1`` [O, K] with H damped as in ``solve``, which is from :func:`solve_order`."""
    order, lower, _ = solve
    result = torch.empty_like(cross)
    result[:, order] = torch.cholesky_solve(cross[:, order].t(), lower).t()
    return result


def nearest(weight: Tensor, scale: Tensor, zero_point: Tensor, qtype: QType) -> Tensor:
    """Codes (float64, whole numbers) of ``weight``, each rounded alone; all shapes broadcast."""
    return torch.round(weight.double() / scale).add_(zero_point).clamp_(qtype.qmin, qtype.qmax)


def gptq(
    weight: Tensor, solve: tuple[Tensor, Tensor, Tensor], scale: Tensor, zero_point: Tensor, qtype: QType
) -> tuple[Tensor, Tensor]:
    """Codes (float32, whole numbers) [F, R, K] of ``weight`` [R, K] with each of F scales, and :func:`layer_error`
    [F, R] of what each leaves.

    ``solve`` is from :func:`solve_order`; ``scale`` [F, R, K] and ``zero_point`` [R, K] may differ between columns. A
    diagonal H gives rounding to nearest. Where no code is clipped, the error in the damped H is at most
    ``sum_k (s_k L_kk / 2)^2`` (Babai's nearest plane), L being the factor. That bounds the loss; it does not make each
    row better than :func:`nearest`.
    """
    order, lower, added = solve
    w, diagonal = weight.double().t()[order].contiguous(), lower.diagonal()
    lost = w.new_empty(len(order), *scale.shape[:2])
    codes, errors = lost.float(), torch.zeros_like(lost[0])
    scale, zero_point = scale.permute(2, 0, 1)[order], zero_point.t()[order]  # columns next to each other in memory
    for stop in range(len(order), 0, -BLOCK):
        start = max(stop - BLOCK, 0)
        inner = lower[start:stop, start:stop]
        left = (lower[stop:, start:stop].t() @ lost[stop:].flatten(1)).view(-1, *errors.shape)
        for k in reversed(range(start, stop)):
            i, s, z = k - start, scale[k].double(), zero_point[k]
            pull = (inner[i + 1 :, i] @ lost[k + 1 : stop].flatten(1)).view_as(errors).add_(left[i])
            aim = w[k] + pull / diagonal[k]
            codes[k] = code = torch.round(aim / s).add_(z).clamp_(qtype.qmin, qtype.qmax)
            rounded = (code - z) * s
            lost[k] = w[k] - rounded
            errors += ((aim - rounded) * diagonal[k]).square_()
    errors -= torch.einsum("kfr,k->fr", lost.square(), added)
    result = torch.empty_like(codes)
    result[order] = codes
    return result.permute(1, 2, 0), errors


def layer_error(difference: Tensor, hessian: Tensor) -> Tensor:
    """``d H d^T`` of each row d of ``difference`` [R, K]: [R], float64."""
    difference = difference.double()
    return ((difference @ hessian.double()) * difference).sum(1)
