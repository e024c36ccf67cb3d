from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from ptq_tdq.calib_data import choose_steps
from ptq_tdq.errors import ConfigError, UsageError

TIMESTEPS = torch.arange(999, -1, -1)


@pytest.mark.parametrize("total", [2, 3, 7, 20, 50])
def test_uniform_steps_are_distinct_include_both_ends_and_differ_by_at_most_one_in_spacing(total: int) -> None:
    for count in range(2, total + 1):
        steps = choose_steps(TIMESTEPS[:total], count, "uniform")
        gaps = {b - a for a, b in pairwise(steps)}
        assert (steps[0], steps[-1], len(steps)) == (0, total - 1, count)
        assert min(gaps) >= 1
        assert max(gaps) - min(gaps) <= 1


def test_qdiffusions_twenty_of_one_hundred() -> None:
    steps = choose_steps(torch.arange(990, -1, -10), 20, "uniform")
    assert len(set(steps)) == 20


def test_all_steps_are_taken_when_all_are_asked_for() -> None:
    for distribution in ("uniform", "normal"):
        assert choose_steps(TIMESTEPS[:9], 9, distribution) == list(range(9))


def test_normal_steps_follow_the_density_of_ptq4dm() -> None:
    """Mean of N(0.4 T, (0.4 T)^2) truncated to [0, T]: mu + sigma (phi(a) - phi(b)) / (Phi(b) - Phi(a)), in T."""
    standard = torch.distributions.Normal(0.0, 1.0)
    a, b = torch.tensor(-1.0), torch.tensor(1.5)
    ratio = (standard.log_prob(a).exp() - standard.log_prob(b).exp()) / (standard.cdf(b) - standard.cdf(a))
    expected = 1000 * (0.4 + 0.4 * ratio.item())

    generator = torch.Generator().manual_seed(0)
    drawn = [TIMESTEPS[choose_steps(TIMESTEPS, 20, "normal", generator)] for _ in range(400)]
    mean = torch.stack(drawn).double().mean().item()

    assert mean == pytest.approx(expected, abs=10)  # 8000 draws with a deviation of 250: standard error 2.8
    assert mean < 500


def test_normal_steps_are_distinct_ordered_and_repeatable() -> None:
    first, again = (choose_steps(TIMESTEPS, 50, "normal", torch.Generator().manual_seed(3)) for _ in range(2))
    assert first == again == sorted(set(first))
    assert first != choose_steps(TIMESTEPS, 50, "normal", torch.Generator().manual_seed(4))


@pytest.mark.parametrize("count", [0, -1, 11])
def test_an_impossible_count_is_refused(count: int) -> None:
    with pytest.raises(ConfigError, match="between 1 and 10"):
        choose_steps(TIMESTEPS[:10], count)


def test_an_unknown_distribution_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match=r"uniform, normal\. Got 'gamma'"):
        choose_steps(TIMESTEPS, 5, "gamma")  # type: ignore[arg-type]
