"""Thinned curves, quantiles and short decimals: facts that hold for any numbers."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ptq_tdq.observe import Observer
from ptq_tdq.report.curves import magnitude, quantiles, short, shorts, thin

curves = st.lists(st.floats(-100, 100), min_size=2, max_size=60)


@given(curves, st.floats(0, 10))
def test_straight_lines_between_the_kept_points_stay_within_the_tolerance(
    values: list[float], tolerance: float
) -> None:
    kept = thin(values, tolerance)
    assert kept[0] == 0 and kept[-1] == len(values) - 1 and (np.diff(kept) > 0).all()
    drawn = np.interp(np.arange(len(values)), kept, np.array(values)[kept])
    assert np.abs(drawn - values).max() <= tolerance + 1e-9


def test_a_straight_line_needs_its_ends_only_and_a_step_both_sides_of_it() -> None:
    assert thin(np.linspace(3, 7, 1000), 1e-6).tolist() == [0, 999]
    assert thin([1.0] * 50 + [2.0] * 50, 0.01).tolist() == [0, 49, 50, 99]
    assert thin([5.0], 0.1).tolist() == [0]


def test_quantiles_and_magnitude_are_those_of_the_values() -> None:
    x = torch.randn(2, 4000, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1.0], [3.0]])
    observer = Observer("x", torch.tensor([0.0, 1.0]))
    observer.see(x, torch.tensor([0.0, 1.0]))
    observer.start_counting()
    observer.see(x, torch.tensor([0.0, 1.0]))
    histogram = observer.histogram()
    bin_width = float(histogram.centres[1] - histogram.centres[0])
    levels = (0.01, 0.25, 0.5, 0.99)
    expected = np.quantile(x.numpy(), levels, axis=1, method="inverted_cdf")
    assert np.abs(quantiles(histogram, levels).numpy() - expected).max() < 0.51 * bin_width  # it is in the bin
    assert magnitude(histogram).tolist() == pytest.approx(x.abs().mean(1).tolist(), abs=bin_width)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None])
def test_what_json_cannot_hold_becomes_null(value: float | None) -> None:
    assert short(value) is None


def test_decimals_are_short_and_close() -> None:
    values = [1 / 3, 12345.678, -1e-9, 0.0]
    found = shorts(values)
    assert json.dumps(found) == "[0.3333, 12350.0, -1e-09, 0.0]"
    assert found == pytest.approx(values, rel=1e-3)
