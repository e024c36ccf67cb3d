"""First intervals, before anything is learned: min-max, and the search for the least |x - x_hat|^p.

The search tries the shrink factors 1 - 0.01 i, i = 0..79, of the observed range (BRECQ and Q-Diffusion: p = 2.4), for
all channels of a weight, or all time steps of an activation histogram, at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ptq_tdq.affine import choose_qparams, end_scales, fake_quantize
from ptq_tdq.native import affine as native
from ptq_tdq.scheme import QType

SHRINK_FACTORS = tuple(1 - 0.01 * i for i in range(80))
POWER = 2.4
PIECE = 1 << 18  # numbers that are tried at once
_BOTH_ENDS = ((True, True),)  # which ends of the range move: low, high
_EACH_END = (*_BOTH_ENDS, (False, True), (True, False), (False, True))


@dataclass(frozen=True)
class QParams:
    """Scale (float32) and zero_point (int32) of equal shape."""

    scale: Tensor
    zero_point: Tensor


def _symmetric(lo: Tensor, hi: Tensor, qtype: QType) -> tuple[Tensor, Tensor]:
    """Scale whose middle code is 0, covering the larger of -lo and hi."""
    middle = (qtype.qmin + qtype.qmax + 1) // 2
    bound = torch.maximum(-lo / (middle - qtype.qmin), hi / (qtype.qmax - middle))
    scale = bound.to(torch.float32).clamp(min=torch.finfo(torch.float32).tiny)
    return scale, torch.full_like(scale, middle, dtype=torch.int32)


def row_qparams(rows: Tensor, qtype: QType, *, method: str = "mse", symmetric: bool = False) -> QParams:
    """Intervals of ``rows`` [G, n], each of its own (a weight's output channels, or 1 for per tensor); result [G].

    ``method`` is "minmax" or "mse". ``symmetric`` fixes the zero point at the middle code.
    """
    pieces = rows.split(max(1, PIECE // max(1, rows.shape[1])))  # which stay in the processor's cache
    found = [_piece_qparams(piece, qtype, method, symmetric) for piece in pieces]
    return QParams(torch.cat([f.scale for f in found]), torch.cat([f.zero_point for f in found]))


def _piece_qparams(rows: Tensor, qtype: QType, method: str, symmetric: bool) -> QParams:
    lo, hi = rows.amin(1), rows.amax(1)
    place = _symmetric if symmetric else choose_qparams
    if method == "minmax":
        return QParams(*place(lo, hi, qtype))
    factors = _factors(rows.device)
    scale, zero = place(lo * factors, hi * factors, qtype)
    best = _least(interval_errors(rows, scale, zero, qtype, _size(lo, hi)))
    return QParams(scale.gather(0, best)[0], zero.gather(0, best)[0])


def _factors(device: torch.device) -> Tensor:
    """The shrink factors as a column [F, 1]."""
    return torch.tensor(SHRINK_FACTORS, device=device)[:, None]


def interval_errors(
    x: Tensor, scale: Tensor, zero: Tensor, qtype: QType, size: Tensor, counts: Tensor | None = None
) -> Tensor:
    """Sums of ``|x - x_hat|^p`` over each row of ``x`` for F intervals of its own: [F, G], as ``scale`` and ``zero``.

    ``x`` is [G, n], or the same [n] for all rows. An error is in units of the row's ``size`` [G], near its largest
    value, so that its power is in range, and counts as often as ``counts`` [G, n] says, or once.
    """
    zero, size = zero.to(scale.dtype), size.clamp(max=2.0**126)  # 1 / size is not denormal
    found = native.interval_errors(x, counts, size, scale, zero, (qtype.qmin, qtype.qmax), POWER)
    if found is not None:
        return found
    at_once = max(1, PIECE // max(1, len(size) * x.shape[-1]))  # which stay in the processor's cache
    errors = []
    for some, zeros in zip(scale.split(at_once), zero.split(at_once), strict=True):
        rounded = fake_quantize(x[None], some[..., None], zeros[..., None], qtype)
        error = ((x - rounded) / size[:, None]).abs_().pow_(POWER)
        errors.append((error if counts is None else error.mul_(counts)).sum(-1))
    return torch.cat(errors)


def _least(errors: Tensor) -> Tensor:
    """The index [1, G] of the least of F errors [F, G], the first of equals; what is no number is none of them."""
    return errors.nan_to_num(nan=torch.inf, posinf=torch.inf).argmin(0, keepdim=True)


def _size(lo: Tensor, hi: Tensor) -> Tensor:
    """A power of two near the largest value of each row."""
    largest = torch.maximum(-lo, hi).to(torch.float32).clamp(min=torch.finfo(torch.float32).tiny)
    return torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent - 1)


@dataclass(frozen=True)
class Histogram:
    """Counts [K, bins] of an activation for K time steps over one common grid, and the exact ranges lo, hi [K]."""

    counts: Tensor
    centres: Tensor
    lo: Tensor
    hi: Tensor

    def pooled(self, group: Tensor, groups: int) -> Histogram:
        """Merge time steps: row k goes to row ``group[k]``; groups without a row are empty."""
        counts = torch.zeros(groups, self.counts.shape[1]).index_add_(0, group, self.counts)
        lo = torch.full((groups,), torch.inf).scatter_reduce_(0, group, self.lo, "amin")
        hi = torch.full((groups,), -torch.inf).scatter_reduce_(0, group, self.hi, "amax")
        return Histogram(counts, self.centres, lo, hi)


RATIOS = tuple(1 - 0.05 * i for i in range(16))  # of the intervals of vectors' own ranges


def vector_qparams(x: Tensor, qtype: QType) -> QParams:
    """Intervals [B, ...] of the vectors of ``x`` [B, ..., K], each from its own least and largest value."""
    lo, hi = x.float().aminmax(dim=-1)
    return QParams(*choose_qparams(lo, hi, qtype))


def ratio_errors(x: Tensor, qtype: QType, unit: Tensor) -> Tensor:
    """``|x - x_hat|^p`` of ``x`` [B, n, K] with each of :data:`RATIOS` times the vectors' intervals: [B, F].

    ``unit`` is near the largest value, so that no power overflows.
    """
    x = x.float()
    found, rows = vector_qparams(x, qtype), x.flatten(0, -2)
    scale = torch.tensor(RATIOS, device=x.device)[:, None] * found.scale.flatten()
    zero = found.zero_point.flatten().expand_as(scale)
    errors = interval_errors(rows, scale, zero, qtype, unit.expand(len(rows)))
    return (errors.view(-1, *x.shape[:2]).mean(2) / x.shape[2]).t()


def activation_qparams(
    histogram: Histogram,
    qtype: QType,
    *,
    method: str = "mse",
    from_zero: bool = False,
    zero_point: Tensor | None = None,
) -> QParams:
    """Intervals [K] for the K rows of a histogram.

    ``method`` is "minmax" or "ema" (the range as observed), "mse" (one shrink factor for both ends of the range) or
    "mse-ends" (then one for each end, in turn); ``from_zero`` makes the lowest code stand for 0 (softmax outputs); a
    given ``zero_point`` (a scalar) is kept and only the scale is searched.
    """
    lo, hi = histogram.lo, histogram.hi
    if from_zero:
        lo = torch.zeros_like(lo)

    def place(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        if zero_point is None:
            return choose_qparams(lo * low, hi * high, qtype)
        down, up = end_scales(lo, hi, zero_point, qtype)  # a side without codes cannot be covered and does not count
        scale = torch.maximum(down * low, up * high).clamp(min=torch.finfo(torch.float32).tiny)
        return scale, zero_point.to(torch.int32).expand_as(scale)

    factors, size = _factors(lo.device), _size(lo, hi)
    low = high = torch.ones_like(lo)  # the best factors so far
    for moves_low, moves_high in {"minmax": (), "ema": (), "mse": _BOTH_ENDS, "mse-ends": _EACH_END}[method]:
        new_low = (factors if moves_low else low).expand(len(factors), len(lo))
        new_high = (factors if moves_high else high).expand(len(factors), len(lo))
        scale, zero = place(new_low, new_high)
        best = _least(interval_errors(histogram.centres, scale, zero, qtype, size, histogram.counts))
        low, high = new_low.gather(0, best)[0], new_high.gather(0, best)[0]
    scale, zero = place(low, high)
    return QParams(scale, zero.to(torch.int32))
