"""Ranges and histograms against numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ptq_tdq.errors import NonFiniteError
from ptq_tdq.observe import Observer

STEPS = torch.tensor([0.0, 499.5, 999.0])


def test_ranges_and_counts_of_each_step() -> None:
    torch.manual_seed(0)
    x, t = torch.randn(9, 4, 5, 5), STEPS.repeat(3)
    observer = Observer("layer", STEPS)
    for batch in range(0, 9, 2):
        observer.see(x[batch : batch + 2], t[batch : batch + 2])
    observer.start_counting()
    for batch in range(0, 9, 4):
        observer.see(x[batch : batch + 4], t[batch : batch + 4])
    found = observer.histogram()
    for k, step in enumerate(STEPS):
        mine = x[t == step]
        assert found.lo[k] == mine.min() and found.hi[k] == mine.max()
        counts, edges = np.histogram(mine.numpy(), found.counts.shape[1], (x.min().item(), x.max().item()))
        # a value on an edge may fall to either side in float32; the distributions agree
        assert found.counts[k].sum() == mine.numel()
        assert np.abs(np.cumsum(found.counts[k].numpy()) - np.cumsum(counts)).max() <= 1
        np.testing.assert_allclose(found.centres.numpy(), (edges[1:] + edges[:-1]) / 2, atol=1e-5)


def test_ema_is_the_running_average_of_the_batches_of_a_step() -> None:
    torch.manual_seed(1)
    observer = Observer("layer", torch.tensor([3.0, 7.0]), ema=True)
    batches = [torch.randn(2, 50) for _ in range(5)]
    for batch in batches:
        observer.see(batch, torch.tensor([3.0, 3.0]))
    lo, hi = batches[0].min(), batches[0].max()
    for batch in batches[1:]:
        lo, hi = 0.95 * lo + 0.05 * batch.min(), 0.95 * hi + 0.05 * batch.max()
    torch.testing.assert_close(observer.lo[0], lo)
    torch.testing.assert_close(observer.hi[0], hi)
    assert math.isinf(observer.lo[1]), "a step that no batch had stays unknown"


def test_with_ema_values_outside_count_in_the_outer_bins() -> None:
    observer = Observer("layer", torch.tensor([0.0]), ema=True)
    t = torch.zeros(1)
    observer.see(torch.tensor([[-1.0, 1.0]]), t)
    observer.start_counting()
    observer.see(torch.tensor([[-9.0, 0.01, 9.0]]), t)
    counts = observer.histogram().counts[0]
    assert counts[0] == 1 and counts[-1] == 1 and counts.sum() == 3


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_names_the_layer_and_t(bad: float) -> None:
    x = torch.zeros(3, 4)
    x[1, 2] = bad
    with pytest.raises(NonFiniteError, match=r"mid\.conv.*t = 499\.5"):
        Observer("mid.conv", STEPS).see(x, STEPS)


def test_a_step_at_which_nothing_came_takes_what_its_nearest_has() -> None:
    observer = Observer("expert", torch.tensor([1.0, 10.0, 500.0, 999.0]))
    x, t = torch.randn(2, 50, generator=torch.Generator().manual_seed(0)), torch.tensor([10.0, 999.0])
    observer.see(x, t)
    observer.see(torch.empty(0, 50), torch.empty(0))
    observer.start_counting()
    observer.see(x, t)
    found = observer.filled()
    assert torch.equal(found.lo, x.amin(1)[[0, 0, 0, 1]]) and torch.equal(found.hi, x.amax(1)[[0, 0, 0, 1]])
    assert torch.equal(found.counts, found.counts[[1, 1, 1, 3]]) and found.counts[0].sum() == 50


def test_an_activation_that_never_came_has_the_range_of_zeros() -> None:
    observer = Observer("expert", STEPS)
    observer.start_counting()
    found = observer.filled()
    assert bool((found.lo == 0).all() and (found.hi == 0).all() and (found.counts == 0).all())
