"""Calls that a user's own loop makes of a module: what is kept of them, and that they are the same calls again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from calibrated import QUICK
from torch import Tensor, nn

from ptq_tdq import Calls, calibrate, record
from ptq_tdq.calls import Recorder, main_argument, prediction
from ptq_tdq.calls.arguments import split_rows
from ptq_tdq.errors import CalibrationSetError, ModelError, TimestepError
from ptq_tdq.identity import base_config, model_name, model_sha256
from ptq_tdq.timeaxis import TimeAxis
from ptq_tdq.timed_model import TimedModel
from ptq_tdq.wrap import folded_copy

B = 2
Change = Callable[[Tensor], Tensor]


class Conditioned(nn.Module):
    """Takes what denoisers take: nested conditions, shared tables, several rows for each sample, rows behind layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mix = nn.Linear(4, 4)

    def forward(self, sample: Tensor, timestep: Any, extra: Any = None, **more: Any) -> tuple[Tensor]:
        t = torch.as_tensor(timestep, dtype=torch.float32).reshape(-1, 1)
        y = self.mix(sample) + t / 1000
        if extra is not None:
            y = y * extra["scale"] + extra["list"][0].flatten(1)[:, :4]
        if "positions" in more:  # one for each of the 4 features, whatever the batch
            if more["positions"].shape != (4,):
                raise ValueError("positions")
            y = y + more["positions"]
        if "flags" in more:  # one for all samples
            y = y + more["flags"]
        if "frames" in more:  # three for each sample
            frames = more["frames"] if isinstance(more["frames"], list) else [more["frames"]]
            y = y + sum(x.unflatten(0, (len(sample), 3)).sum(1) for x in frames)
        if "layers" in more:  # [layers, batch, 4]
            for layer in more["layers"]:
                if len(layer) != len(sample):
                    raise ValueError("layers")
                y = y + layer
        return (y,)


def loop(
    model: nn.Module, steps: tuple[float, ...] = (999.0, 500.0, 1.0), count: int = B, **options: Any
) -> list[Tensor]:
    torch.manual_seed(1)
    found = []
    for t in steps:
        x = torch.randn(count, 4)
        found.append(model(x, torch.full((count,), t), **options)[0])
        x.zero_()  # as samplers do that reuse their memory
    return found


@pytest.fixture
def model() -> Conditioned:
    return Conditioned().requires_grad_(False)


def replayed(model: nn.Module, calls: Calls, size: int = B) -> list[Tensor]:
    return [prediction(model(**calls.inputs(chunk))) for chunk in calls.chunks(size)]


def options(count: int) -> dict[str, dict[str, Any]]:
    torch.manual_seed(2)
    return {
        "plain": {},
        "nested": {
            "extra": {"scale": torch.rand(count, 1), "list": [torch.rand(count, 4, 2)], "name": "x", "none": None}
        },
        "as long as the batch": {"positions": torch.rand(4)},
        "shared": {"flags": torch.rand(())},
        "several": {"frames": torch.rand(3 * count, 4)},
        "several in many": {"frames": [torch.rand(3 * count, 4) for _ in range(5)]},
        "layers first": {"layers": torch.rand(3, count, 4)},
        "layers as long as the batch": {"layers": torch.rand(count, count, 4)},
        "all": {
            "extra": {"scale": torch.rand(count, 1), "list": (torch.rand(count, 4, 2),)},
            "positions": torch.rand(4),
            "frames": torch.rand(3 * count, 4),
            "layers": torch.rand(2, count, 4),
        },
    }


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("name", options(1))
def test_recorded_calls_are_the_calls_that_were_made(model: Conditioned, name: str, count: int) -> None:
    kept = options(count)[name]
    expected = loop(model, count=count, **kept)
    with record(model) as calls:
        assert all(map(torch.equal, loop(model, count=count, **kept), expected)), "outputs are left as they are"
    assert len(calls) == 3 * count
    assert all(map(torch.equal, replayed(model, calls, count), expected))
    for row, y in enumerate(torch.cat(expected)):
        one = prediction(model(**calls.inputs(torch.tensor([row]))))[0]
        torch.testing.assert_close(one, y, rtol=1e-4, atol=1e-5)
    rows = torch.tensor([0, 0, 3 * count - 1])
    torch.testing.assert_close(prediction(model(**calls.inputs(rows))), torch.cat(expected)[rows], rtol=1e-4, atol=1e-5)


def test_t_and_the_samples_of_each_row_are_known(model: Conditioned) -> None:
    with record(model) as calls:
        loop(model)
        loop(model)
    assert calls.t.tolist() == [999.0, 999.0, 500.0, 500.0, 1.0, 1.0] * 2
    assert calls.trajectory.tolist() == [0, 1] * 3 + [2, 3] * 3
    assert calls.axis == TimeAxis("timestep")


def test_a_time_that_all_samples_share_is_that_of_each_row(model: Conditioned) -> None:
    with record(model) as calls:
        for t in (999, torch.tensor(500), torch.tensor([1.0])):
            model(torch.randn(3, 4), t)
    assert calls.t.tolist() == [999.0] * 3 + [500.0] * 3 + [1.0] * 3


@pytest.mark.parametrize("shape", [(1,), (1, 1), (1, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("count", [1, 2])
def test_a_time_keeps_its_dimensions_whatever_the_batch(model: Conditioned, shape: tuple[int, ...], count: int) -> None:
    with record(model) as calls:
        for value in (999.0, 1.0):
            model(torch.randn(count, 4), torch.full(shape, value))
    assert calls.inputs(slice(0, count))["timestep"].shape == (count, *shape[1:])
    assert calls.t.tolist() == [999.0] * count + [1.0] * count


def test_prompts_of_other_lengths_are_groups_of_their_own() -> None:
    class Texts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Linear(4, 4)

        def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
            y: Tensor = self.mix(x) + text.mean(1)
            return y

    model = Texts().requires_grad_(False)
    with record(model) as calls:
        for t in (999.0, 1.0):
            for tokens in (3, 5):
                model(torch.randn(2, 4), torch.full((2,), t), torch.randn(2, tokens, 4))
    assert [len(group) for group in calls.groups] == [4, 4]
    assert calls.t.tolist() == [999.0, 999.0, 1.0, 1.0] * 2
    assert [c.stop - c.start for c in calls.chunks(3)] == [3, 1, 3, 1], "never across groups"
    some = calls.select(torch.tensor([1, 5, 6]))
    assert [len(group) for group in some.groups] == [1, 2] and some.t.tolist() == [999.0, 999.0, 1.0]
    assert torch.equal(some.inputs(slice(1, 3))["text"], calls.inputs(slice(5, 7))["text"])


def test_lists_of_samples_have_rows_of_their_own_shapes() -> None:
    class Lists(nn.Module):
        def forward(self, x: list[Tensor], t: Tensor) -> list[Tensor]:
            return [item * when for item, when in zip(x, t, strict=True)]

    model = Lists()
    with record(model) as calls:
        model([torch.ones(2, 3), torch.ones(4, 3)], torch.tensor([0.5, 0.25]))
        model([torch.ones(1, 3), torch.ones(1, 3)], torch.tensor([0.125, 0.0625]))
    assert len(calls) == 4 and len(calls.groups) == 1
    assert [x.shape for x in calls.inputs(torch.tensor([1, 2]))["x"]] == [(4, 3), (1, 3)]


@pytest.mark.parametrize("single_first", [True, False])
def test_a_condition_that_samples_share_in_some_calls_has_rows_in_all(model: Conditioned, single_first: bool) -> None:
    one, each, shared = torch.rand(1, 4), torch.rand(3, 4), torch.rand(1, 1)
    expected = []
    with record(model) as calls:
        for flags in (one, each) if single_first else (each, one):
            extra = {"scale": shared, "list": [torch.ones(3, 4)]}
            expected += model(torch.randn(3, 4), torch.tensor([9.0, 5.0, 1.0]), extra, flags=flags)
    assert [len(group) for group in calls.groups] == [6]
    assert all(map(torch.equal, replayed(model, calls, 3), expected))
    found = calls.inputs(slice(1, 5))
    assert found["flags"].shape == (4, 4) and found["extra"]["scale"].shape == (1, 1)


def test_only_wanted_calls_are_kept_and_guidance_repeats_the_samples(model: Conditioned) -> None:
    recorder = Recorder(model)
    steps: list[int] = []
    recorder.begin(10, samples=2, wanted=lambda step: torch.tensor([step == 0, step == 1]), on_step=steps.append)
    with recorder.listening():
        for t in (900.0, 500.0):
            for _ in range(2):  # with and without the prompt, one after the other
                model(torch.randn(4, 4), torch.full((4,), t))
    calls = recorder.calls(TimeAxis("timestep"))
    assert steps == [0, 0, 1, 1]
    assert calls.t.tolist() == [900.0] * 4 + [500.0] * 4
    assert calls.trajectory.tolist() == [10] * 4 + [11] * 4


@pytest.mark.parametrize("t", [None, "1", True, torch.empty(0), torch.tensor([1j, 1j])], ids=str)
def test_a_call_without_a_time_step_is_an_error_in_that_call(model: Conditioned, t: Any) -> None:
    with pytest.raises(TimestepError), record(model):
        model(torch.randn(2, 4), t)
    assert not model._forward_pre_hooks


@dataclass
class Output:
    loss: Tensor | None
    sample: Tensor


FORMS: list[Callable[[Tensor], Any]] = [
    lambda x: x,
    lambda x: (None, {"logits": None, "sample": [x, 2 * x]}),
    lambda x: Output(None, x),
    lambda x: {"none": [], "sample": list(x)},
    lambda x: (torch.zeros(()), x),
    lambda x: {"loss": [torch.zeros(()), torch.ones(())], "sample": x},
]


@pytest.mark.parametrize("form", FORMS)
def test_the_prediction_is_the_first_tensor_with_rows_of_any_output(form: Callable[[Tensor], Any]) -> None:
    x = torch.randn(3, 4)
    assert torch.equal(prediction(form(x)), torch.stack([x, 2 * x]) if form is FORMS[1] else x)


def test_samples_in_another_dimension_than_the_first_are_refused() -> None:
    with pytest.raises(TimestepError, match="2 values of timestep for 6 samples"):
        split_rows({"frames": torch.randn(6, 4), "timestep": torch.tensor([9.0, 3.0])}, "timestep")


def test_models_without_a_time_an_input_or_an_output_are_refused() -> None:
    with pytest.raises(CalibrationSetError, match="without a tensor"):
        prediction((None, {"loss": 3.0}))
    with pytest.raises(ModelError, match="time step"), record(nn.Linear(1, 1)):
        pass
    with pytest.raises(CalibrationSetError, match="no tensor beside its time step"):
        main_argument({"timestep": torch.zeros(1), "flag": 3}, "timestep")


def test_nothing_recorded_and_values_that_are_not_finite_are_refused(model: Conditioned) -> None:
    with record(model) as calls:
        pass
    with pytest.raises(CalibrationSetError, match="empty"):
        calls.check()
    with record(model) as calls:
        model(torch.ones(1, 4), torch.tensor([999.0]))
        model(torch.full((1, 4), torch.inf), torch.tensor([37.0]))
    with pytest.raises(CalibrationSetError, match=r"NaN or Inf in 'sample' at time step t = 37"):
        calls.check()


def test_a_time_argument_that_was_named_is_known_from_then_on() -> None:
    class Denoiser(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x: Tensor, log_snr: Tensor) -> Tensor:
            y: Tensor = self.a(x) * log_snr[:, None].sigmoid()
            return y

    model = Denoiser().requires_grad_(False)
    with record(model, time="log_snr") as calls:
        for value in (-15.0, -3.0, 2.0, 15.0):
            model(torch.ones(2, 4), torch.full((2,), value))
    assert calls.t[[0, 2, 4, 6]].tolist() == pytest.approx([100, 420, 1660 / 3, 900])
    inputs = calls.inputs(slice(2, 4))
    assert torch.equal(TimedModel(model, calls.axis)(**inputs), model(**inputs))


class Stateful(Conditioned):
    """Computes its deep features at every second step, counts its steps, and is noisy."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))
        self.step, self.kept, self.last = 0, dict[str, Tensor](), torch.zeros(4)

    def forward(self, sample: Tensor, timestep: Any, extra: Any = None, **more: Any) -> tuple[Tensor]:
        if self.step % 2 == 0:
            self.kept["deep"] = super().forward(sample, timestep, extra, **more)[0]
        self.step += 1
        self.mean += sample.mean(0)
        self.last = self.kept["deep"] + self.mean + self.step + torch.randn(len(sample), 4)
        self.found = True
        return (self.last,)


@pytest.mark.parametrize("name", options(1))
def test_what_a_model_keeps_between_its_calls_is_left_to_the_loop(name: str) -> None:
    kept, expected = options(B)[name], loop(other := Stateful().requires_grad_(False), **options(B)[name])
    with record(model := Stateful().requires_grad_(False)) as calls:
        assert all(map(torch.equal, loop(model, **kept), expected))
    assert len(calls) == 3 * B and model.step == 3
    assert torch.equal(model.mean, other.mean) and torch.equal(model.last, other.last)


class Circular(Conditioned):
    """Holds a list that contains itself, and is known to a module inside, too."""

    def __init__(self) -> None:
        super().__init__()
        self.tree, self.part = list[Any](), nn.Identity()
        self.tree.append({"pair": (self.tree, torch.zeros(4))})
        self.part.tree = self.tree  # type: ignore[assignment]

    def forward(self, sample: Tensor, timestep: Any, extra: Any = None, **more: Any) -> tuple[Tensor]:
        found, value = self.tree[0]["pair"]
        value += 1
        assert found is self.tree is self.part.tree
        return super().forward(sample, timestep, extra, **more)


def test_an_attribute_that_contains_itself_hides_nothing_of_the_arguments() -> None:
    model = Circular().requires_grad_(False)
    with record(model) as calls:
        expected = loop(model, count=4, positions=torch.rand(4))
    assert torch.equal(model.tree[0]["pair"][1], torch.full((4,), 3.0))
    torch.testing.assert_close(torch.cat(replayed(model, calls, 2)), torch.cat(expected))


def test_without_conditions_to_tell_apart_the_model_is_not_called_again(model: Conditioned) -> None:
    seen: list[Any] = []
    with record(model), model.register_forward_hook(lambda *given: seen.append(given)):
        loop(model)
    assert len(seen) == 3


class Refusing(Conditioned):
    """Looks for what only calls of its loop leave behind."""

    def forward(self, sample: Tensor, timestep: Any, extra: Any = None, **more: Any) -> tuple[Tensor]:
        if torch.is_grad_enabled():
            return super().forward(sample, timestep, extra, **more)
        raise KeyError("gradients")


def test_what_a_call_beside_the_loop_raises_does_not_reach_it() -> None:
    with record(model := Refusing()) as calls:
        loop(model, flags=torch.rand(4), labels=torch.arange(B))
    assert len(calls) == 3 * B


class Energy(nn.Module):
    """Predicts by the gradient of an energy."""

    def __init__(self, turns_gradients_on: bool) -> None:
        super().__init__()
        self.net, self.on = nn.Linear(4, 1), turns_gradients_on

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """sample [B, 4]."""
        with torch.set_grad_enabled(self.on or torch.is_grad_enabled()):
            x = sample.detach().requires_grad_()
            return torch.autograd.grad(self.net(x).square().sum(), x)[0]


@pytest.mark.parametrize("on", [False, True])
def test_a_model_that_differentiates_itself_is_refused(on: bool) -> None:
    model = Energy(on)
    with record(model) as calls:
        model(torch.randn(2, 4), torch.tensor([3, 5]))
    with pytest.raises(ModelError, match="Energy differentiates itself"):
        calibrate(model, QUICK, calls)


class Guided(Conditioned):
    """Has guidance in another method, which calls ``forward``."""

    def guided(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return 2 * self.forward(sample, timestep)[0] - self.forward(-sample, timestep)[0]


def test_calls_of_forward_that_nothing_hears_are_one_sentence() -> None:
    model, given = Guided(), (torch.randn(B, 4), torch.tensor([3, 5]))
    with pytest.raises(ModelError, match=r"No call of Guided was heard, .* call the model itself"), record(model):
        model.guided(*given)
    with record(model) as calls:
        model.mix(given[0])  # a part alone
        model(*given)
    assert len(calls) == B
    assert not model.mix._forward_pre_hooks


class Inferring(Conditioned):
    """Runs in inference mode, whoever calls it."""

    @torch.inference_mode()
    def forward(self, sample: Tensor, timestep: Any, extra: Any = None, **more: Any) -> tuple[Tensor]:
        return super().forward(sample, timestep, extra, **more)


def test_a_model_that_turns_inference_mode_on_is_refused() -> None:
    with record(model := Inferring()) as calls:
        loop(model)
    with pytest.raises(ModelError, match="Inferring turns inference mode on"):
        calibrate(model, QUICK, calls)
    with record(model), pytest.raises(ModelError, match="Inferring turns inference mode on"):
        loop(model, positions=torch.rand(4), extra={"scale": torch.rand(B, 1), "list": [torch.rand(B, 4, 2)]})


class Starred(Conditioned):
    """Takes conditions by position alone."""

    def forward(self, sample: Tensor, timestep: Any, *conditions: Tensor, **more: Any) -> tuple[Tensor]:  # type: ignore[override]
        return super().forward(sample + sum(conditions), timestep, **more)


def test_arguments_without_names_are_refused() -> None:
    model = Starred().requires_grad_(False)
    with record(model) as calls:
        expected = loop(model)
    assert all(map(torch.equal, replayed(model, calls), expected))
    with record(model), pytest.raises(ModelError, match=r"Starred was called with arguments for \*conditions, .* name"):
        model(torch.randn(B, 4), torch.tensor([3, 5]), torch.randn(B, 4))


class InPlace(Conditioned):
    """Computes in its arguments, and takes items out of them."""

    def forward(self, sample: Tensor, timestep: Any, extra: Any = None, **more: Any) -> tuple[Tensor]:
        timestep /= 2
        return super().forward(sample.mul_(0.5) + extra["list"].pop().mean(1) + more["positions"].add_(1), timestep)


def test_a_model_may_write_into_its_arguments() -> None:
    def run(model: nn.Module) -> Tensor:
        given = {"extra": {"list": [torch.ones(B, 2, 4)]}, "positions": torch.zeros(4)}
        found: Tensor = model(torch.ones(B, 4), torch.tensor([3.0, 5.0]), **given)[0]
        return found

    model = InPlace().requires_grad_(False)
    expected = run(model)
    with record(model) as calls:
        assert torch.equal(run(model), expected)
    sha256 = calls.sha256
    calibrate(model, QUICK, calls)
    assert calls.sha256 == sha256 and calls.t.tolist() == [3.0, 5.0]
    assert torch.equal(replayed(model, calls)[0], expected)


def test_calls_are_recorded_in_front_of_hooks_which_see_them_again(model: Conditioned) -> None:
    def larger(_: nn.Module, args: Any, given: dict[str, Any]) -> Any:
        return args, {**given, "sample": 3 * given["sample"]}

    model.register_forward_pre_hook(larger, with_kwargs=True)
    with record(model) as calls:
        expected = model(sample=torch.ones(B, 4), timestep=torch.tensor([3, 5]))[0]
    assert torch.equal(replayed(model, calls)[0], expected)


def test_hooks_that_hear_of_positions_alone_hear_of_calls_that_are_made_again(model: Conditioned) -> None:
    model.register_forward_pre_hook(lambda _, args: (3 * args[0], *args[1:]))
    model.register_forward_hook(lambda _, args, output: (output[0] + args[0],))
    model.register_forward_pre_hook(  # and one that asks for an argument by its name still finds it
        lambda _, args, kwargs: (args, kwargs | {"extra": {**kwargs["extra"], "scale": 2 * kwargs["extra"]["scale"]}}),
        with_kwargs=True,
    )
    extra = {"scale": torch.rand(4, 1), "list": [torch.rand(4, 4, 2)]}
    with record(model) as calls:
        expected = loop(model, count=4, positions=torch.rand(4), extra=extra)
    torch.testing.assert_close(torch.cat(replayed(folded_copy(model), calls, 2)), torch.cat(expected))


def test_a_compiled_model_is_recorded_as_the_one_inside(model: Conditioned) -> None:
    compiled = torch.compile(model, backend="eager")
    sets = []
    for recorded in (model, compiled):
        with record(recorded) as calls:
            compiled(torch.ones(B, 4), torch.tensor([3, 5]))
        sets.append(calls)
    assert sets[0].sha256 == sets[1].sha256
    for fact in (model_name, base_config, model_sha256):
        assert fact(compiled) == fact(model)


class Own(dict[str, Any]):
    """Of which trees of tensors know nothing."""


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (Own(scale=torch.ones(B, 1)), "type Own"),
        ({"scale": torch.eye(B).to_sparse()}, "type sparse or nested tensor"),
        (np.bool_(True), "type numpy.bool"),
    ],
)
def test_an_argument_that_looks_like_a_tree_of_tensors_is_refused(value: Any, said: str, model: Conditioned) -> None:
    with record(model), pytest.raises(CalibrationSetError, match=f"an argument of {said}, .* plain dicts, lists"):
        model(torch.randn(B, 4), torch.tensor([3, 5]), extra=value)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Conditioned, "A type is no module"),
        (lambda: None, "A NoneType is no module"),
        (lambda: torch.jit.script(nn.Linear(4, 4)), "is TorchScript"),
    ],
)
def test_what_is_no_module_with_calls_is_refused(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(ModelError, match=said), record(make(), time="input"):
        pass


@pytest.mark.parametrize("length", [-1, 10.5, "x", True])
def test_a_length_of_the_axis_that_is_none_is_refused(length: Any, model: Conditioned) -> None:
    with pytest.raises(TimestepError, match="must be a whole number"), record(model, num_train_timesteps=length):
        pass


@pytest.mark.parametrize("name", ["sample", "extra"])
def test_an_argument_that_is_no_tree_of_tensors_is_refused(name: str, model: Conditioned) -> None:
    given = {"sample": torch.randn(B, 4), "timestep": torch.tensor([3, 5]), name: Output(None, torch.randn(B, 4))}
    with (
        record(model),
        pytest.raises(CalibrationSetError, match=r"an argument of type Output, .* in plain dicts, lists"),
    ):
        model(**given)


class Pair(nn.Module):
    def forward(self, inputs: tuple[Tensor, Tensor], timestep: Tensor) -> Tensor:
        """Points [B, N, 3] and features [B, 3]."""
        points, features = inputs
        return points + (features * timestep[:, None])[:, None]


def test_what_is_denoised_may_be_a_tuple() -> None:
    given, t = (torch.randn(4, 5, 3), torch.randn(4, 3)), torch.tensor([3, 5, 7, 9])
    model = Pair()
    with record(model) as calls:
        model(given, t)
    points, features = calls.inputs(torch.tensor([1, 3]))["inputs"]
    assert len(calls) == 4
    assert torch.equal(points, given[0][[1, 3]]) and torch.equal(features, given[1][[1, 3]])


def test_a_number_beside_what_is_denoised_has_no_rows() -> None:
    class Scaled(nn.Module):
        def forward(self, batch: dict[str, Tensor], timestep: Tensor) -> Tensor:
            return batch["scale"] * batch["x"]

    model = Scaled()
    with record(model) as calls:
        model({"scale": torch.tensor(2.0), "x": torch.ones(B, 4)}, torch.tensor([3, 5]))
    assert len(calls) == B and calls.inputs(slice(0, 1))["batch"]["x"].shape == (1, 4)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ((80.0, 1.0, 0.3, 0.03, 0.02, 0.01), "2 of 6 steps lie so close together"),
        ((80.0, 60.5, 30.0), None),
        ((7.0, 7.0), "All recorded calls are at one time step"),
    ],
)
def test_steps_that_share_intervals_are_said(values: tuple[float, ...], said: str | None) -> None:
    class Denoiser(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
            y: Tensor = self.b(self.a(x) * sigma[:, None])
            return y

    model = Denoiser().requires_grad_(False)
    with record(model) as calls:
        for value in values:
            model(torch.ones(2, 4), torch.full((2,), value))
    of_steps = [notice for notice in calibrate(model, QUICK, calls).notices if " step" in notice]
    assert len(of_steps) == (said is not None) and all(notice.startswith(said or "") for notice in of_steps)
