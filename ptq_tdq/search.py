"""First intervals, before anything is learned: min-max, and the search for the least |x - x_hat|^p.

The search tries the shrink factors 1 - 0.01 i, i = 0..79, of the observed range (BRECQ and Q-Diffusion: p = 2.4), for
all channels of a weight, or all time steps of an activation histogram, at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ptq_tdq.affine import choose_qparams, end_scales, fake_quantize
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
    best_scale, best_zero = place(lo, hi, qtype)
    if method == "minmax":
        return QParams(best_scale, best_zero)
    size = _size(lo, hi)
    best = torch.full_like(best_scale, torch.inf)
    for factors in _pieces(rows):
        scale, zero = place(lo * factors, hi * factors, qtype)
        error = _error(rows, scale, zero, qtype, size).mean(-1)
        best, (best_scale, best_zero) = _better(error, best, (scale, zero), (best_scale, best_zero))
    return QParams(best_scale, best_zero)


def _pieces(x: Tensor) -> list[Tensor]:
    """The shrink factors as columns [F, 1], as many at once as small tensors like ``x`` allow."""
    count = max(1, PIECE // max(1, x.numel()))
    return list(torch.tensor(SHRINK_FACTORS, device=x.device)[:, None].split(count))


def _error(x: Tensor, scale: Tensor, zero: Tensor, qtype: QType, size: Tensor) -> Tensor:
    """``|x - x_hat|^p`` of ``x`` [n] or [G, n] for F intervals of each row [F, G]: [F, G, n], in units of ``size``."""
    rounded = fake_quantize(x[None], scale[..., None], zero[..., None], qtype)
    return ((x - rounded) / size).abs_().pow_(POWER)


def _better(
    error: Tensor, best: Tensor, new: tuple[Tensor, ...], old: tuple[Tensor, ...]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The least of ``best`` [G] and ``error`` [F, G], the first of equals, and what belongs to it of old and new."""
    index = error.argmin(0, keepdim=True)
    least = error.gather(0, index)[0]
    better = least < best
    chosen = (torch.where(better, n.gather(0, index)[0], o) for n, o in zip(new, old, strict=True))
    return torch.where(better, least, best), tuple(chosen)


def _size(lo: Tensor, hi: Tensor) -> Tensor:
    """A power of two near the largest value of each row [G, 1]: the power p of an error in this unit is in range."""
    largest = torch.maximum(-lo, hi).to(torch.float32).clamp(min=torch.finfo(torch.float32).tiny)
    return torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent - 1)[:, None]


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
    found = vector_qparams(x, qtype)
    x, scale, zero = x.float() / unit, found.scale[..., None] / unit, found.zero_point[..., None]
    errors = [(x - fake_quantize(x, scale * ratio, zero, qtype)).abs().pow(POWER).mean((1, 2)) for ratio in RATIOS]
    return torch.stack(errors, 1)


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

    x, best, size = histogram.centres, torch.full_like(lo, torch.inf), _size(lo, hi)
    low = high = torch.ones_like(lo)  # the best factors so far
    for moves_low, moves_high in {"minmax": (), "ema": (), "mse": _BOTH_ENDS, "mse-ends": _EACH_END}[method]:
        first_low, first_high = low, high
        for factors in _pieces(histogram.counts):
            shape = len(factors), len(lo)
            new_low = (factors if moves_low else first_low).expand(shape)
            new_high = (factors if moves_high else first_high).expand(shape)
            scale, zero = place(new_low, new_high)
            error = _error(x, scale, zero, qtype, size).mul_(histogram.counts).sum(-1)
            best, (low, high) = _better(error, best, (new_low, new_high), (low, high))
    scale, zero = place(low, high)
    return QParams(scale, zero.to(torch.int32))
