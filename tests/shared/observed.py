"""What tests of interval sources share: an activation that grows over t, observed, and a source built from that."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ptq_tdq.intervals import IntervalChoices, IntervalSource, Observed, source_class
from ptq_tdq.observe import Observer
from ptq_tdq.scheme import QType

T = 1000
STEPS = torch.linspace(1, 961, 25).round()


def activation(t: Tensor) -> Tensor:
    """Normal with a standard deviation that grows from 0.5 to 2 over t: one draw, scaled, so that only t tells."""
    x = torch.randn(400, generator=torch.Generator().manual_seed(0)) + 0.3
    return x * (0.5 + 1.5 * (t / T))[:, None]


def watch(x: Tensor, t: Tensor, bits: int, **options: Any) -> Observed:
    """Observe the rows of ``x`` at ``t``."""
    observer = Observer("layer", t.unique())
    observer.see(x, t)
    observer.start_counting()
    observer.see(x, t)
    choices = IntervalChoices(**{"zero_point": "fixed", **options})
    return Observed(T, t.unique(), observer.histogram(), QType(bits), choices=choices)


def observe(steps: Tensor = STEPS, bits: int = 4, drift: float = 0.0, **options: Any) -> Observed:
    return watch(activation(steps) + drift * (steps / T)[:, None], steps, bits, **options)


def build(method: str, observed: Observed) -> IntervalSource:
    torch.manual_seed(0)
    return source_class(method).build(method, observed).eval()


def scales(source: IntervalSource) -> Tensor:
    return source.table(T)[0]


def check_table(source: IntervalSource) -> None:
    """A finite, positive scale and a 4-bit zero point at each time step from 0 to T."""
    scale, zero_point = source.table(T)
    assert scale.shape == zero_point.shape == (T + 1,)
    assert scale.dtype == torch.float32 and zero_point.dtype == torch.int32
    assert bool(torch.isfinite(scale).all() and (scale > 0).all())
    assert bool(((zero_point >= 0) & (zero_point <= 15)).all())
