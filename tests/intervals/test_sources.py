"""Every interval source of the registry, started from one activation whose range changes with t."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from observed import STEPS, T, activation, build, check_table, observe, scales

from ptq_tdq.errors import ConfigError
from ptq_tdq.intervals import IntervalSource, source_class
from ptq_tdq.intervals.base import LearnedScale
from ptq_tdq.intervals.table import TableSource
from ptq_tdq.scheme import QType
from ptq_tdq.search import row_qparams

QUICK = ["static", "S_1", "S_2", "S_4", "S_7", "S_20", "S_1000", "step-table", "step-lsq"]


@pytest.mark.parametrize("zero_point", ["fixed", "own"])
@pytest.mark.parametrize("parameter", ["raw", "log"])
@pytest.mark.parametrize("method", QUICK)
def test_tables_hold_a_positive_interval_and_a_code_for_each_time_step(
    method: str, parameter: str, zero_point: str
) -> None:
    check_table(build(method, observe(interval_parameter=parameter, zero_point=zero_point)))


# static and S_N


def test_static_is_the_search_over_all_samples() -> None:
    observed = observe(bits=8)
    direct = row_qparams(activation(STEPS).reshape(1, -1), QType(8))  # the same search, on the raw values
    scale, zero_point = build("static", observed).table(T)
    assert scale.unique().numel() == zero_point.unique().numel() == 1
    torch.testing.assert_close(scale[:1], direct.scale, rtol=0.02, atol=0)


def test_s_1_is_static() -> None:
    observed = observe()
    for ours, theirs in zip(build("S_1", observed).table(T), build("static", observed).table(T), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("bins", [2, 4, 7, 20, T])
def test_s_n_is_constant_in_each_nth_of_the_time_axis(bins: int) -> None:
    source = build(f"S_{bins}", observe())
    owner = next(m for m in source.modules() if isinstance(m, LearnedScale))
    assert owner.value.shape == (bins,)
    with torch.no_grad():
        owner.value.copy_(torch.arange(1.0, bins + 1).log())
    expected = [min(t * bins // T, bins - 1) + 1 for t in range(T + 1)]  # t = T belongs to the last bin
    torch.testing.assert_close(scales(source), torch.tensor(expected, dtype=torch.float32))


def test_each_bin_is_the_search_over_its_own_samples_and_an_unseen_one_copies_its_nearest() -> None:
    steps = torch.tensor([10.0, 20.0, 600.0, 990.0])
    scale, zero_point = build("S_10", observe(steps)).table(T)
    for member, t in ((steps[:2], 0), (steps[2:3], 650), (steps[3:], 950)):
        direct = row_qparams(activation(steps)[torch.isin(steps, member)].reshape(1, -1), QType(4))
        torch.testing.assert_close(scale[t : t + 1], direct.scale, rtol=0.05, atol=0)
    assert scale[150] == scale[0] and scale[250] == scale[0]  # bins 1 and 2: bin 0 is nearer than bin 6
    assert scale[450] == scale[650] and scale[750] == scale[650] and scale[850] == scale[950]
    assert zero_point[850] == zero_point[950]


# per-step sources


@pytest.mark.parametrize("method", ["step-table", "step-lsq"])
@pytest.mark.parametrize("zero_point", ["fixed", "own"])
def test_step_sources_hold_the_steps_and_are_linear_in_between(method: str, zero_point: str) -> None:
    observed = observe(zero_point=zero_point, drift=2.0)
    expected = np.interp(np.arange(T + 1), STEPS.numpy(), observed.steps.scale.numpy())
    scale, zero = build(method, observed).table(T)
    np.testing.assert_allclose(scale.numpy(), expected, rtol=1e-5)
    at_steps = observed.steps.zero_point if zero_point == "own" else observed.static.zero_point.expand(len(STEPS))
    assert torch.equal(zero[STEPS.long()], at_steps.to(torch.int32))
    assert (zero.unique().numel() == 1) == (zero_point == "fixed")


@pytest.mark.parametrize("method", ["S_1", "S_4", "S_10", "step-table", "step-lsq", "tdq", "tdq-thin"])
def test_all_sources_have_the_same_freedom_of_zero_points(method: str) -> None:
    """Where the activation drifts with t, each interval has its own zero point in every source, or in none."""
    for choice in ("fixed", "own"):
        observed = observe(zero_point=choice, drift=2.0)
        _, zero = build(method, observed).table(T)
        moves = choice == "own" and method != "S_1"
        assert (zero != observed.static.zero_point).any() == moves


def test_step_sources_accept_integer_steps() -> None:
    observed = observe()
    integers = replace(observed, t=observed.t.long())
    for method in ("step-table", "step-lsq", "S_4", "tdq-thin"):
        torch.testing.assert_close(scales(build(method, integers)), scales(build(method, observed)))


# all of them


ALL = [*((m, {}) for m in QUICK), ("tdq", {"module_start": "as-is"}), ("tdq-thin", {"module_start": "as-is"})]


@pytest.mark.parametrize(("method", "options"), ALL)
@pytest.mark.parametrize("zero_point", ["fixed", "own"])
def test_each_sample_of_a_batch_has_its_own_time_step(method: str, options: dict[str, str], zero_point: str) -> None:
    source = build(method, observe(zero_point=zero_point, **options))
    t = torch.tensor([1000.0, 3.0, 3.0, 500.0, 0.0])
    scale, zero = source(t, torch.empty(5, 0))
    table = source.table(T)
    torch.testing.assert_close(scale.detach(), table[0][t.long()])
    assert torch.equal(zero, table[1][t.long()])


@pytest.mark.parametrize(("method", "options"), [(m, o) for m, o in ALL if m != "step-table"])
@pytest.mark.parametrize("parameter", ["raw", "log"])
def test_gradients_reach_each_learned_parameter(method: str, options: dict[str, str], parameter: str) -> None:
    source = build(method, observe(interval_parameter=parameter, **options))
    scale, _ = source(torch.arange(T + 1), torch.empty(T + 1, 0))
    scale.sum().backward()
    learned = list(source.parameters())
    assert learned and all(p.grad is not None and bool((p.grad != 0).any()) for p in learned)
    raw = {id(p) for p in source.raw_parameters()}
    assert raw == {id(p) for name, p in source.named_parameters() if not name.startswith("net.")} != set()
    assert list(build("step-table", observe()).parameters()) == []


def test_a_logarithmic_scale_changes_by_a_ratio() -> None:
    source = LearnedScale(torch.tensor([0.01, 10.0]), "log")
    with torch.no_grad():
        source.value += 0.1
    torch.testing.assert_close(source().detach(), torch.tensor([0.01, 10.0]) * np.exp(0.1))


def test_a_raw_scale_stays_positive() -> None:
    source = LearnedScale(torch.tensor([0.01]), "raw")
    with torch.no_grad():
        source.value -= 1
    assert source().item() > 0


def test_a_table_stays_float32_in_a_half_precision_model() -> None:
    scale = torch.rand(T) + 0.1
    table = TableSource(scale, torch.zeros(T, dtype=torch.int32)).half()
    assert table.scale.dtype == torch.float32 and torch.equal(table.scale, scale)


def test_fixed_clips_nothing_at_any_step_and_is_not_learned() -> None:
    source = build("fixed", replace(observe(bits=8), range_method="minmax"))
    x = activation(STEPS)
    scale, zero_point = source(STEPS, x)
    assert not list(source.parameters())
    assert (scale * (0 - zero_point) <= x.flatten(1).amin(1)).all()
    assert (scale * (255 - zero_point) >= x.flatten(1).amax(1)).all()


# the registry


@pytest.mark.parametrize("method", ["nonsense", "S_0", "S_", "S_04", "TDQ", "", "tdq ", "S_4x"])
def test_an_unknown_method_is_an_error_that_names_the_methods(method: str) -> None:
    with pytest.raises(ConfigError) as caught:
        source_class(method)
    for name in ("static", "S_4", "tdq", "tdq-thin", "step-table", "step-lsq", "dynamic"):
        assert name in str(caught.value)
    assert repr(method) in str(caught.value)


@pytest.fixture
def own_source() -> Iterator[type[IntervalSource]]:
    class Own(TableSource):
        pattern = "own-source"

    yield Own
    del IntervalSource.registry["own-source"]


def test_adding_a_source_is_adding_a_class(own_source: type[IntervalSource]) -> None:
    assert source_class("own-source") is own_source
    check_table(build("own-source", observe()))


def test_a_finished_table_is_not_a_method() -> None:
    assert TableSource not in IntervalSource.registry.values()


def test_range_methods() -> None:
    observed = observe()
    x = activation(STEPS)
    full = replace(observed, range_method="minmax")
    torch.testing.assert_close(full.static.scale, (x.max() - x.min()) / 15)
    torch.testing.assert_close(full.steps.scale.shape, STEPS.shape)
    assert observed.static.scale < full.static.scale, "4 bits clip a normal distribution"
