"""Watching one activation during calibration: exact ranges first, then a histogram per time step over them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ptq_tdq import processes
from ptq_tdq.errors import NonFiniteError
from ptq_tdq.scheme import QType
from ptq_tdq.search import RATIOS, Histogram, ratio_errors

BINS = 2048
VALUES = 8192  # counted per sample, about; the ranges are exact
TRIED = 4096  # with each ratio
EMA_MOMENTUM = 0.95


class Observer:
    """Two passes over the same batches: ``see`` every batch, then ``start_counting``, then ``see`` every batch again.

    ``steps`` [K] are the distinct time steps of the calibration set, ascending. With ``ema`` the range of a step is the
    running average of its batches' ranges instead of their extremes, and values outside count in the outer bins. With
    ``vectors``, the type of their codes, the second pass also tries ratios of the intervals of vectors' own ranges.
    """

    def __init__(self, name: str, steps: Tensor, *, ema: bool = False, vectors: QType | None = None) -> None:
        self.name, self.steps, self.ema, self.vectors = name, steps, ema, vectors
        self.errors = torch.zeros(len(steps), len(RATIOS))
        self.lo = torch.full((len(steps),), torch.inf)
        self.hi = torch.full((len(steps),), -torch.inf)
        self.ranges: list[tuple[Tensor, Tensor]] = []  # of each batch
        self.counts: Tensor | None = None

    def start_counting(self) -> None:
        """End the first pass; raises :class:`NonFiniteError` for a range too wide for an interval in float32."""
        lo, hi = self._range()
        if not bool(torch.isfinite(2 * (hi - lo))):  # twice, because learned intervals may grow
            t = self.steps[torch.maximum(-self.lo, self.hi).argmax()]
            raise NonFiniteError(
                f"{self.name} has activations from {lo:g} to {hi:g}, the largest at t = {t:g}: no interval in float32 "
                "can hold them."
            )
        self.counts = torch.zeros(len(self.steps) * BINS, device=self.lo.device)

    def see(self, x: Tensor, t: Tensor) -> None:
        """Take in a batch ``x`` [B, ...] at ``t`` [B]; raises :class:`NonFiniteError` naming the layer and t."""
        if self.steps.device != x.device:
            kept = self.steps, self.lo, self.hi, self.errors
            self.steps, self.lo, self.hi, self.errors = (v.to(x.device) for v in kept)
        rows, index = x.detach().flatten(1).float(), torch.searchsorted(self.steps, t.to(self.steps.dtype).contiguous())
        if self.counts is not None:
            lo, width = self._grid()
            # an odd stride walks through all channels and positions, whose numbers are mostly powers of two
            rows = rows[:, :: (rows.shape[1] // VALUES) | 1]
            bins = ((rows - lo) / width).long().clamp_(0, BINS - 1) + index[:, None] * BINS
            self.counts += torch.bincount(bins.flatten(), minlength=self.counts.numel())
            if self.vectors is not None:
                self.errors.index_add_(0, index, self._try_ratios(x, self.vectors))
            return
        lo, hi = rows.amin(1), rows.amax(1)
        finite = torch.isfinite(lo) & torch.isfinite(hi)
        if not bool(finite.all()):
            raise NonFiniteError(f"{self.name} has NaN or Inf in its activations at t = {t[~finite][0].item():g}.")
        batch_lo = torch.full_like(self.lo, torch.inf).scatter_reduce_(0, index, lo, "amin")
        batch_hi = torch.full_like(self.hi, -torch.inf).scatter_reduce_(0, index, hi, "amax")
        self.ranges.append((batch_lo, batch_hi))
        self._widen(batch_lo, batch_hi)

    def join(self) -> None:
        """End a pass: take in what other processes have seen in it, in their order."""
        if self.counts is not None:
            self.counts, self.errors = processes.total(self.counts), processes.total(self.errors)
            return
        self.lo, self.hi = torch.full_like(self.lo, torch.inf), torch.full_like(self.hi, -torch.inf)
        for lo, hi in processes.gather(self.ranges):
            self._widen(lo.to(self.lo.device), hi.to(self.lo.device))

    def _widen(self, batch_lo: Tensor, batch_hi: Tensor) -> None:
        """Take the ranges of a batch into those of the steps."""
        if self.ema:
            seen, known = torch.isfinite(batch_lo), torch.isfinite(self.lo)
            keep = torch.where(known, EMA_MOMENTUM, 0.0)
            self.lo = torch.where(seen, torch.where(known, self.lo, 0.0) * keep + batch_lo * (1 - keep), self.lo)
            self.hi = torch.where(seen, torch.where(known, self.hi, 0.0) * keep + batch_hi * (1 - keep), self.hi)
        else:
            self.lo, self.hi = torch.minimum(self.lo, batch_lo), torch.maximum(self.hi, batch_hi)

    def histogram(self) -> Histogram:
        """The histogram of both passes, on the CPU; a step at which nothing was seen has the range [inf, -inf]."""
        assert self.counts is not None, "start_counting() comes first"
        lo, width = (v.cpu() for v in self._grid())
        centres = lo + width * (torch.arange(BINS) + 0.5)
        return Histogram(self.counts.view(-1, BINS).cpu(), centres, self.lo.cpu(), self.hi.cpu())

    def ratios(self) -> Histogram:
        """The error [K, F] at each step, or at the nearest one that was seen, with each ratio (``centres`` [F])."""
        seen = torch.isfinite(self.lo).cpu()
        nearest = _nearest(self.steps.cpu(), seen.nonzero().flatten()) if bool(seen.any()) else torch.arange(len(seen))
        one = torch.ones(len(seen))
        return Histogram(self.errors.cpu()[nearest], torch.tensor(RATIOS), one, one)

    def _try_ratios(self, x: Tensor, qtype: QType) -> Tensor:
        """Errors [B, F] of some vectors of ``x`` [B, ..., K], and in long ones of their ends and some values."""
        x = x.detach().flatten(1, -2) if x.ndim > 2 else x.detach()[:, None]
        x = x[:, :: max(1, x[0].numel() // TRIED) | 1]
        lo, hi = self._range()
        unit = torch.maximum(-lo, hi).clamp(min=torch.finfo(torch.float32).tiny)
        if x[0].numel() > TRIED:
            ends = torch.stack(x.aminmax(dim=-1), -1)
            x = torch.cat([x[..., :: (x.shape[-1] // TRIED) | 1], ends], -1)
        return ratio_errors(x, qtype, unit)

    def filled(self) -> Histogram:
        """The histogram, with the nearest step's row where nothing was seen: an expert is not sent to at each step."""
        found, steps = self.histogram(), self.steps.cpu()
        seen = torch.isfinite(found.lo).nonzero().flatten()
        if not len(seen):
            return replace(found, lo=torch.zeros_like(found.lo), hi=torch.zeros_like(found.hi))
        nearest = _nearest(steps, seen)
        return replace(found, counts=found.counts[nearest], lo=found.lo[nearest], hi=found.hi[nearest])

    def _range(self) -> tuple[Tensor, Tensor]:
        seen = torch.isfinite(self.lo)
        lo, hi = torch.where(seen, self.lo, torch.inf).min(), torch.where(seen, self.hi, -torch.inf).max()
        return torch.where(seen.any(), lo, 0.0), torch.where(seen.any(), hi, 0.0)

    def _grid(self) -> tuple[Tensor, Tensor]:
        lo, hi = self._range()
        return lo, ((hi - lo) / BINS).clamp(min=torch.finfo(torch.float32).tiny)


def _nearest(steps: Tensor, seen: Tensor) -> Tensor:
    """For each step [K] the number of the nearest one among ``seen``."""
    return seen[(steps[:, None] - steps[seen]).abs().argmin(1)]
