"""The curve through values at some steps: what it must be for values that are a curve, noise, or both."""

from __future__ import annotations

import numpy as np
import torch

from ptq_tdq.intervals.smooth import smooth

T = torch.linspace(1, 961, 25)
AXIS = torch.arange(1001)


def noise(seed: int) -> torch.Tensor:
    return torch.randn(len(T), generator=torch.Generator().manual_seed(seed))


def wave(t: torch.Tensor) -> torch.Tensor:
    return torch.sin(t / 150)


def test_a_smooth_curve_is_found_between_the_steps_too() -> None:
    assert (smooth(T, wave(T), AXIS) - wave(AXIS))[1:962].abs().max() < 0.01


def test_noise_is_taken_away_from_a_curve_and_alone_it_is_nothing() -> None:
    for seed in range(5):
        values = wave(T) + 0.2 * noise(seed)
        assert (smooth(T, values, AXIS) - wave(AXIS)).square().mean() < 0.5 * 0.04
        assert smooth(T, noise(seed), AXIS).square().mean() < 0.5


def test_between_steps_it_stays_near_the_values() -> None:
    for seed in range(5):
        values = 0.5 + 0.3 * noise(seed)
        curve = smooth(T, values, AXIS)
        assert values.min() - 0.3 < curve.min() and curve.max() < values.max() + 0.3
        assert curve.diff().abs().max() < 0.1


def test_few_values_are_their_mean() -> None:
    np.testing.assert_allclose(smooth(T[:3], torch.tensor([1.0, 2.0, 6.0]), AXIS), 3.0)
