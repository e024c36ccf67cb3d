"""t of a call, from whatever a model takes for it; tables are exact at whole t and linear in between."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    DDIMScheduler,
    DDPMWuerstchenScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    IPNDMScheduler,
)
from torch import Tensor, nn

from ptq_tdq.errors import ModelError, TimestepError
from ptq_tdq.timeaxis import TimeAxis, at, find_axis, lookup, present, signature_of, time_argument

T = 1000
TABLE = torch.rand(T + 1, generator=torch.Generator().manual_seed(0))
AXIS = TimeAxis("timestep")


# tables


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32, torch.float64])
def test_whole_time_steps_are_exact(dtype: torch.dtype) -> None:
    t = torch.tensor([0, 999, 1, 500, 500, 961, 1000])
    assert torch.equal(lookup(TABLE, AXIS.t(t.to(dtype))), TABLE[t])


def test_fractional_time_steps_are_linear_between_neighbours() -> None:
    t = torch.tensor([0.0, 0.25, 37.5, 998.75, 999.5, 1000.0, 12.0])
    expected = np.interp(t.numpy(), np.arange(T + 1), TABLE.numpy())
    np.testing.assert_allclose(lookup(TABLE, t).numpy(), expected, rtol=1e-5)


def test_integer_tables_stay_integer() -> None:
    table = torch.tensor([0, 10, 4], dtype=torch.int32)
    found = lookup(table, torch.tensor([0.0, 0.31, 1.0, 1.5, 2.0]))
    assert found.dtype == torch.int32 and found.tolist() == [0, 3, 10, 7, 4]


# t of an argument


@pytest.mark.parametrize(
    ("axis", "value", "expected"),
    [
        (AXIS, 7, [7.0]),
        (AXIS, 7.5, [7.5]),
        (AXIS, torch.tensor(7), [7.0]),
        (AXIS, torch.tensor([3, 999], dtype=torch.int32), [3.0, 999.0]),
        (AXIS, torch.tensor([999.0, 1000.0]), [999.0, 1000.0]),
        (AXIS, torch.tensor([512.0], dtype=torch.bfloat16), [512.0]),
        (AXIS, torch.tensor([[5.0, 7.0], [9.0, 9.0]]), [7.0, 9.0]),  # a time per token
        (TimeAxis("t", T, 1000.0), torch.tensor([0.999, 0.001, 1.0]), [999.0, 1.0, 1000.0]),
        (TimeAxis("t", T, -1000.0, 1000.0), torch.tensor([0.001, 0.0, 1.0]), [999.0, 1000.0, 0.0]),
    ],
)
def test_t_is_the_schedulers_time(axis: TimeAxis, value: Any, expected: list[float]) -> None:
    found = axis.t(value)
    assert found.dtype == torch.float32 and found.tolist() == expected
    if not isinstance(value, Tensor) or value.ndim < 2:
        torch.testing.assert_close(axis.value(found), torch.atleast_1d(torch.as_tensor(value)).float())


@pytest.mark.parametrize("t", [-1, -0.01, 1000.01, 1234.5, math.nan, math.inf, -math.inf])
def test_outside_the_axis_is_an_error_that_names_t(t: float) -> None:
    with pytest.raises(TimestepError, match=rf"0 to 1000\. Got t = {t:g};"):
        AXIS.t(torch.tensor([5.0, t, -3.0]))


@pytest.mark.parametrize(
    "value",
    [
        None,
        "999",
        True,
        torch.tensor([True]),
        torch.empty(0),
        torch.tensor([1j]),
        [],
        pytest.param(object(), id="object"),
        ["a"],
        torch.empty(2, 0),
    ],
    ids=str,
)
def test_what_is_no_time_step_is_one_clear_error(value: Any) -> None:
    with pytest.raises(TimestepError, match="timestep"):
        AXIS.t(value)


# the axis of a model


def schedule_of(scheduler: Any, steps: int = 7) -> list[float]:
    extra = {"mu": 1.0} if scheduler.config.get("use_dynamic_shifting") else {}
    scheduler.set_timesteps(steps, **extra)
    return [float(t) for t in scheduler.timesteps]


SCHEDULES = {
    "ddim": schedule_of(DDIMScheduler()),
    "euler": schedule_of(EulerDiscreteScheduler()),
    "flow": schedule_of(FlowMatchEulerDiscreteScheduler(shift=3.0)),
    "one step": [1000.0],
}
FORMS = {"t": (1.0, 0.0), "sigma": (1000.0, 0.0), "1 - sigma": (-1000.0, 1000.0)}


def test_a_value_outside_is_named_beside_those_that_the_tables_cover() -> None:
    axis = find_axis("sigma", [2.0, -2.0])
    with pytest.raises(TimestepError, match=r"called with sigma = 3.5, which is not between -2.5 and 2.5: sample with"):
        axis.t(torch.tensor([0.0, 3.5]))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_axis_is_found_from_the_schedule_and_the_calls(name: str, form: str, dtype: torch.dtype) -> None:
    schedule, (scale, offset) = SCHEDULES[name], FORMS[form]
    seen = [float(torch.tensor((t - offset) / scale).to(dtype)) for t in schedule]
    axis = find_axis("timestep", seen, schedule, T)
    assert (axis.scale, axis.offset) == (scale, offset)
    found = axis.t(torch.tensor(seen))
    torch.testing.assert_close(found, torch.tensor(schedule), rtol=4e-3, atol=4 if dtype == torch.bfloat16 else 1e-2)


@pytest.mark.parametrize("largest", [1.000003695, 1.003])  # SanaSprint starts at 1.5708 / (pi / 2)
def test_a_time_that_begins_just_above_1_is_a_part_of_the_axis(largest: float) -> None:
    seen = [largest, 0.6, 0.25]
    axis = find_axis("t", seen)
    torch.testing.assert_close(axis.t(torch.tensor(seen)), 1000 * torch.tensor(seen), rtol=4e-3, atol=0)
    assert axis.t(torch.tensor([largest])) == 1000


def test_without_a_schedule_a_time_that_never_exceeds_1_is_a_part_of_the_axis() -> None:
    assert find_axis("t", [1.0, 0.75, 0.5]).scale == 1000
    assert find_axis("t", [0.5]).scale == 1000
    assert find_axis("t", [999.0, 500.0, 1.0]).scale == 1
    assert find_axis("t", [1.0, 0.0]).scale == 1, "the last steps of a scheduler"
    assert find_axis("t", [80.5, 40.25], total=T).scale == 1, "a run that began late"
    assert find_axis("t", [90.5, 77.9, 65.4, 52.8, 40.2]).scale == 1, "the same, whatever its number of steps"


UNUSUAL = {
    "continuous": EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction"),
    "consistency": CMStochasticIterativeScheduler(),
    "edm": EDMEulerScheduler(),
}


@pytest.mark.parametrize("seen", [[1.1, 0.4, -0.8, -1.5], [80.0, 10.0, 1.0, 0.1, 0.002], [0.3], [-4.0]])
def test_times_of_another_kind_are_stretched_over_the_axis(seen: list[float]) -> None:
    """Sigma and its logarithm, as EDM's models take them."""
    axis = find_axis("t", seen)
    t = axis.t(torch.tensor(seen))
    assert bool((t[:-1] > t[1:]).all())
    if len(seen) > 1:
        assert (t[0] - t[-1]) == pytest.approx(T / (1 + 2 / 8)), "room for other numbers of steps"
    axis.t(torch.tensor(seen) * 1.05)


@pytest.mark.parametrize("name", UNUSUAL)
@pytest.mark.parametrize("steps", [1, 4])
def test_an_axis_from_few_steps_has_all_that_the_scheduler_gives(name: str, steps: int) -> None:
    total = UNUSUAL[name].config.num_train_timesteps
    few, many, reach = (schedule_of(UNUSUAL[name], count) for count in (steps, 40, total))
    axis = find_axis("timestep", few, few, total, reach)
    t = axis.t(torch.tensor(many))
    assert t.amax() - t.amin() > T / 2 and len(t.round().unique()) > 20


@pytest.mark.parametrize("scheduler", [IPNDMScheduler(), DDPMWuerstchenScheduler()], ids=["IPNDM", "Wuerstchen"])
@pytest.mark.parametrize("steps", [1, 8])
def test_a_schedule_that_never_exceeds_1_counts_in_parts_of_the_axis(scheduler: Any, steps: int) -> None:
    schedule, reach = schedule_of(scheduler, steps), schedule_of(scheduler, T)
    assert find_axis("t", schedule[:steps], schedule, T, reach).scale == 1000


PARTS = [k / 8 for k in range(8, 0, -1)]
SHORT = {
    "a run from 1 to 0": (PARTS, PARTS, 1, [1.0]),
    "the same by its calls": (PARTS, [], 1, []),
    "few steps": ([10 * t for t in PARTS], [], 10, []),
    "angles of SCM": ([1.57, 1.3], [1.57, 1.3, 0.0], 1000, []),
    "the same angles by their calls": ([1.57, 1.3], [], 1000, []),
}


@pytest.mark.parametrize("name", SHORT)
def test_a_table_has_entries_enough_for_values_that_are_no_training_steps(name: str) -> None:
    seen, schedule, total, reach = SHORT[name]
    t = find_axis("t", seen, schedule, total, reach).t(torch.tensor(seen))
    assert float((t[:-1] - t[1:]).min()) > 50


@pytest.mark.parametrize("total", [1, 4, 40])
def test_few_training_steps_are_an_axis_as_they_are(total: int) -> None:
    steps = [float(t) for t in range(total)]
    assert find_axis("t", steps, steps, total, steps) == TimeAxis("t", total)


@pytest.mark.parametrize("change", [{"scale": 0.0}, {"num_train_timesteps": 0}, {"offset": math.nan}, {"argument": 3}])
def test_an_axis_of_a_file_is_checked(change: dict[str, Any]) -> None:
    assert TimeAxis.from_dict(AXIS.to_dict()) == AXIS
    with pytest.raises((TypeError, ValueError)):
        TimeAxis.from_dict(AXIS.to_dict() | change)


def model_with(*names: str) -> nn.Module:
    class Net(nn.Module):
        pass

    body: dict[str, Any] = {}
    exec(f"def forward(self, {', '.join(names)}): ...", body)
    Net.forward = body["forward"]  # type: ignore[method-assign]
    return Net()


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("sample", "timestep"), "timestep"),
        (("x", "t", "y"), "t"),
        (("hidden_states", "timesteps"), "timesteps"),
        (("sample", "timestep_ratio"), "timestep_ratio"),
        (("x", "decoder_noise_time"), "decoder_noise_time"),
    ],
)
def test_the_time_argument_is_found_by_its_name(names: tuple[str, ...], expected: str) -> None:
    assert time_argument(model_with(*names)) == expected


def test_another_name_is_given_and_no_name_is_an_error() -> None:
    model = model_with("x", "when")
    assert time_argument(model, "when") == "when"
    with pytest.raises(ModelError, match="no argument named 'then'"):
        time_argument(model, "then")
    with pytest.raises(ModelError, match="no argument that is known to hold a time step"):
        time_argument(model)


def test_a_signature_is_known_again_and_one_of_a_module_itself_comes_first() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor, timestep: Tensor, *, more: int = 1) -> Tensor:
            return x

    models = Model(), Model()
    assert list(signature_of(models[0]).parameters) == ["x", "timestep", "more"]
    assert signature_of(models[0]) is signature_of(models[1])
    models[0].forward = lambda y, t: y  # type: ignore[method-assign]
    assert list(signature_of(models[0]).parameters) == ["y", "t"]
    assert list(signature_of(models[1]).parameters) == ["x", "timestep", "more"]


def test_a_module_that_does_not_take_its_arguments_by_name_is_refused() -> None:
    opaque = model_with("x", "t")
    opaque.forward = max  # has no signature, as what TorchScript has compiled
    for model in (nn.DataParallel(model_with("x", "t")), opaque, model_with("x", "/", "t")):
        with pytest.raises(ModelError, match="does not take its arguments by name"):
            time_argument(model)


# t of the call that runs


def test_one_time_step_is_that_of_all_rows_and_several_repeat() -> None:
    with at(torch.tensor([7.0])):
        assert present(3).tolist() == [7, 7, 7]
    with at(torch.tensor([1.0, 2.0, 3.0])):
        assert present(3).tolist() == [1, 2, 3]
        assert present(6).tolist() == [1, 1, 2, 2, 3, 3]
        with pytest.raises(ModelError, match="3 time steps do not fit a batch of 4"):
            present(4)
    with at(torch.tensor([2.0, 2.0])):
        assert present(5).tolist() == [2] * 5, "no sample differs"


def test_outside_a_call_there_is_no_time() -> None:
    with at(torch.tensor([7.0])):
        pass
    with pytest.raises(ModelError, match="outside"):
        present(1)


def test_calls_in_other_threads_have_their_own_time() -> None:
    def read(t: float) -> bool:
        with at(torch.tensor([t])):
            return all(present(2).tolist() == [t, t] for _ in range(200))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, map(float, range(32))))
