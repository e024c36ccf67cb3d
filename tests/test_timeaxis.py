"""Tables are keyed by the value of t: exact for integers, linear in between, an error outside."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ptq_tdq.errors import ModelError, TimestepError
from ptq_tdq.timeaxis import Clock, lookup

TABLE = torch.rand(1000, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32, torch.float64])
def test_integer_time_steps_are_exact(dtype: torch.dtype) -> None:
    t = torch.tensor([0, 999, 1, 500, 500, 961])
    assert torch.equal(lookup(TABLE, t.to(dtype)), TABLE[t])


def test_fractional_time_steps_are_linear_between_neighbours() -> None:
    t = torch.tensor([0.0, 0.25, 37.5, 998.75, 999.0, 12.0])
    expected = np.interp(t.numpy(), np.arange(1000), TABLE.numpy())
    np.testing.assert_allclose(lookup(TABLE, t).numpy(), expected, rtol=1e-5)


def test_integer_tables_stay_integer() -> None:
    table = torch.tensor([0, 10, 4], dtype=torch.int32)
    found = lookup(table, torch.tensor([0.0, 0.31, 1.0, 1.5, 2.0]))
    assert found.dtype == torch.int32 and found.tolist() == [0, 3, 10, 7, 4]


@pytest.mark.parametrize("t", [-1, -0.001, 999.001, 1000, math.nan, math.inf])
def test_outside_the_table_is_an_error_that_names_the_range(t: float) -> None:
    with pytest.raises(TimestepError, match=r"0 to 999.*t = "):
        lookup(TABLE, torch.tensor([5.0, t]))


def test_the_error_names_the_first_wrong_time_step() -> None:
    with pytest.raises(TimestepError, match=r"t = 1234\.5;"):
        lookup(TABLE, torch.tensor([5.0, 1234.5, -3.0]))


@pytest.mark.parametrize("t", [7, 7.0, torch.tensor(7), torch.tensor([7])])
def test_one_time_step_is_that_of_all_samples(t: torch.Tensor | float) -> None:
    clock = Clock()
    clock.set(t)
    assert clock.read(3).tolist() == [7, 7, 7]


def test_a_batch_that_repeats_each_sample_repeats_its_time_step() -> None:
    clock = Clock()
    clock.set(torch.tensor([1, 2, 3]))
    assert clock.read(3).tolist() == [1, 2, 3]
    assert clock.read(6).tolist() == [1, 1, 2, 2, 3, 3]


def test_a_batch_that_does_not_fit_and_a_clock_that_was_not_set_are_errors() -> None:
    clock = Clock()
    with pytest.raises(ModelError, match="outside"):
        clock.read(1)
    clock.set(torch.tensor([1, 2, 3]))
    with pytest.raises(ModelError, match="3 time steps do not fit a batch of 4"):
        clock.read(4)
