"""Numbers for pictures: curves with few points, quantiles of histograms, short decimals."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ptq_tdq.search import Histogram

Array = NDArray[np.float64]


def thin(values: ArrayLike, tolerance: float) -> NDArray[np.int64]:
    """Indices of few points of a curve ``values`` [T]; straight lines between them stay within ``tolerance`` of it.

    The first and last points are among them (Ramer 1972, Douglas and Peucker 1973, with vertical distances).
    """
    y: Array = np.asarray(values, np.float64)
    keep, open_ = {0, len(y) - 1}, [(0, len(y) - 1)]
    while open_:
        first, last = open_.pop()
        if last - first < 2:
            continue
        line = np.interp(np.arange(first, last + 1), (first, last), (y[first], y[last]))
        distance = np.abs(y[first : last + 1] - line)
        worst = int(distance.argmax())
        if distance[worst] > tolerance:
            keep.add(first + worst)
            open_ += [(first, first + worst), (first + worst, last)]
    return np.array(sorted(keep), np.int64)


def quantiles(histogram: Histogram, levels: Iterable[float]) -> Tensor:
    """Quantiles [len(levels), K] of the K rows of a histogram, exact to one bin; NaN for an empty row."""
    counts = histogram.counts.double().cumsum(1)
    total = counts[:, -1:]
    rows = [torch.searchsorted(counts, total * level).clamp(max=counts.shape[1] - 1)[:, 0] for level in levels]
    found = histogram.centres[torch.stack(rows)]
    return torch.where(total[:, 0] > 0, found, torch.nan)


def magnitude(histogram: Histogram) -> Tensor:
    """Mean of |x| [K] of each row."""
    return (histogram.counts * histogram.centres.abs()).sum(1) / histogram.counts.sum(1)


def short(value: float | None, digits: int = 4) -> float | None:
    """A number with few decimals; None for NaN and infinities, which JSON cannot hold."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.{digits}g}")


def shorts(values: Tensor | ArrayLike, digits: int = 4) -> list[float | None]:
    """:func:`short` of each of ``values`` [n]."""
    return [short(value, digits) for value in np.asarray(values, np.float64).tolist()]
