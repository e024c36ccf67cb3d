from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EDMEulerScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler, UNet2DModel

from ptq_tdq.cache import cache_folder
from ptq_tdq.calib_data import (
    LoadedModel,
    LoopSampler,
    Sampled,
    collect,
    collect_cached,
    new_schedule,
    sample_generator,
)
from ptq_tdq.calib_data.collect import drawn, make_recipe
from ptq_tdq.calls import Calls, prediction
from ptq_tdq.errors import NonFiniteError, OutputError, UsageError
from ptq_tdq.evaluate.baseline import baseline_request
from ptq_tdq.files import holding

SMALL: dict[str, Any] = {"samples_per_step": 5, "calibration_steps": 3, "num_inference_steps": 5}


def x_of(calls: Calls) -> torch.Tensor:
    return torch.cat([group.leaf("sample") for group in calls.groups])


def by_trajectory(calls: Calls) -> torch.Tensor:
    """x in the order of the trajectories, each in sampling order."""
    return x_of(calls)[calls.trajectory.argsort(stable=True)]


def test_the_set_is_ordered_by_step_then_by_trajectory_with_one_class_each(model: LoadedModel) -> None:
    found = collect(model, **SMALL)
    assert x_of(found).shape == (15, 3, 8, 8)
    assert found.t.tolist() == [800.0] * 5 + [400.0] * 5 + [0.0] * 5  # DDIM 5: 800, 600, 400, 200, 0
    labels = found.groups[0].leaf("class_labels").tolist()
    assert labels == labels[:5] * 3 and sorted(labels[:3]) == [0, 1, 2]
    assert found.trajectory.tolist() == list(range(5)) * 3
    assert found.recipe["samples_per_step"] == 5
    assert found.recipe["model_sha256"] == model.sha256


@pytest.mark.parametrize("classes", [None, [7, 3, 9]])
def test_classes_are_drawn_evenly_over_trajectories(classes: list[int] | None) -> None:
    unet = UNet2DModel(
        sample_size=8, block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
        num_class_embeds=10,
    )  # fmt: skip
    sampler = LoopSampler(unet, DDIMScheduler(), classes=classes)
    known = classes or list(range(10))
    few = {tuple(drawn(sampler, 2, seed)) for seed in range(20)}
    assert len(few) > 4 and {c for pair in few for c in pair} == set(known)
    for count in (1, 4, 25, 64):
        found = drawn(sampler, count, 0)
        counts = [found.count(c) for c in known]
        assert sum(counts) == count and max(counts) - min(counts) <= 1
        assert drawn(sampler, 100, 0)[:count] == found


def test_the_first_step_is_standard_noise(model: LoadedModel) -> None:
    x = x_of(collect(model, samples_per_step=64, calibration_steps=1, num_inference_steps=1))
    assert abs(x.mean().item()) < 0.03  # 12288 values: standard error 0.009
    assert abs(x.std().item() - 1) < 0.03


def test_each_trajectory_is_one_run_of_the_sampler(model: LoadedModel) -> None:
    found = collect(model, samples_per_step=2, calibration_steps=4, num_inference_steps=4)
    x = x_of(found).unflatten(0, (4, 2))
    scheduler = new_schedule(model.sampler)
    scheduler.set_timesteps(4)
    for k, t in enumerate(scheduler.timesteps[:-1]):
        predicted = prediction(model.denoiser(x[k], t, class_labels=found.groups[0].leaf("class_labels")[:2]))
        assert torch.allclose(scheduler.step(predicted, t, x[k]).prev_sample, x[k + 1], atol=1e-5)


def test_the_result_does_not_depend_on_the_batch_size(stochastic_model: LoadedModel) -> None:
    whole, split = (collect(stochastic_model, **SMALL, batch_size=size) for size in (64, 2))
    assert torch.allclose(by_trajectory(whole), by_trajectory(split), atol=1e-4)
    assert whole.recipe == split.recipe


def test_same_seed_same_bytes_other_seed_other_bytes(model: LoadedModel) -> None:
    assert collect(model, **SMALL).sha256 == collect(model, **SMALL).sha256
    assert collect(model, **SMALL).sha256 != collect(model, **SMALL, seed=1).sha256


@pytest.mark.parametrize(("thinning", "trajectories"), [(2, 10), (3, 15), (7, 15)])
def test_thinned_trajectories_give_as_many_rows_of_more_trajectories(
    model: LoadedModel, thinning: int, trajectories: int
) -> None:
    found = collect(model, **SMALL, thinning=thinning, batch_size=4)
    whole = collect(model, **{**SMALL, "samples_per_step": trajectories})
    assert found.t.unique(return_counts=True)[1].tolist() == [5, 5, 5]
    assert found.trajectory.unique().tolist() == list(range(trajectories))
    rows = {(int(i), float(t)): x for i, t, x in zip(whole.trajectory, whole.t, x_of(whole), strict=True)}
    for i, t, x in zip(found.trajectory, found.t, x_of(found), strict=True):
        assert torch.allclose(x, rows[int(i), float(t)], atol=1e-4)


def test_normal_steps_differ_between_trajectories_and_stay_in_sampling_order(model: LoadedModel) -> None:
    found = collect(model, samples_per_step=6, calibration_steps=4, num_inference_steps=20, step_distribution="normal")
    t = [found.t[found.trajectory == i] for i in range(6)]
    assert all(len(of) == 4 and bool((of.diff() < 0).all()) for of in t)
    assert len({tuple(of.tolist()) for of in t}) > 1


def test_normal_steps_are_drawn_by_their_place_on_the_axis_whatever_the_scheduler_counts_in(model: LoadedModel) -> None:
    sampler = LoopSampler(model.denoiser, EDMEulerScheduler())  # counts in logarithms of sigma, around 0
    asked: dict[str, Any] = {"calibration_steps": 1, "num_inference_steps": 30, "step_distribution": "normal"}
    found = collect(replace(model, sampler=sampler), samples_per_step=256, **asked)
    place = (found.t / found.axis.num_train_timesteps).double()
    known = place.unique()
    density = torch.exp(-0.5 * ((known - 0.4) / 0.4) ** 2)
    expected = float((known * density).sum() / density.sum())
    assert float(known.mean()) - expected > 0.03, "all alike would lie higher"
    assert float(place.mean()) == pytest.approx(expected, abs=0.03)  # a standard error of 0.015


@pytest.mark.parametrize("scheduler", [EulerDiscreteScheduler(use_karras_sigmas=True), HeunDiscreteScheduler()])
def test_other_samplers_fractional_and_repeated_time_steps(model: LoadedModel, scheduler: Any) -> None:
    found = collect(replace(model, sampler=LoopSampler(model.denoiser, scheduler)), **SMALL)
    scheduler.set_timesteps(5)
    known = scheduler.timesteps.float()
    assert all((known - t).abs().min() < 1e-3 for t in found.t)
    assert found.t.max() == 999
    assert x_of(found)[found.t == 999].abs().max() < 6, "the denoiser receives scaled noise"


class _Others(LoopSampler):
    """Makes only the last steps of its schedule, with others between them."""

    first, between = 0, False

    def run(self, denoiser: Any, conditions: Any, generators: Any, num_inference_steps: int, schedule: Any) -> Sampled:
        schedule.set_timesteps(num_inference_steps)
        x = torch.stack([torch.randn(self.shape, generator=generator) for generator in generators])
        for t in schedule.timesteps[self.first :]:
            denoiser(x, t + 50)
            if self.between:
                denoiser(x, t)
        return Sampled(x, None)


@pytest.mark.parametrize(
    ("first", "between", "steps", "t"),
    [
        (7, False, 3, [50, 150, 250]),
        (8, False, 3, [50, 150]),  # all that there are
        (0, True, 2, [0, 950]),
        (5, True, 10, [0, 50, 100, 150, 200, 250, 300, 350, 400, 450]),
    ],
)
@pytest.mark.parametrize("thinning", [1, 3])
def test_steps_are_chosen_among_those_that_the_sampler_makes(
    stochastic_model: LoadedModel, first: int, between: bool, steps: int, t: list[int], thinning: int
) -> None:
    sampler = _Others(stochastic_model.denoiser, DDIMScheduler())  # lists 900, 800, ..., 0
    sampler.first, sampler.between = first, between
    asked: dict[str, Any] = {"calibration_steps": steps, "num_inference_steps": 10, "thinning": thinning}
    found = collect(replace(stochastic_model, sampler=sampler), samples_per_step=2, batch_size=2, **asked)
    known, counts = found.t.unique(return_counts=True)
    assert known.tolist() == pytest.approx(t) and counts.tolist() == [2] * len(t)


class _Twice(LoopSampler):
    """Goes through a short schedule before its own, as FreeInit's fast sampling does."""

    def run(self, denoiser: Any, conditions: Any, generators: Any, num_inference_steps: int, schedule: Any) -> Sampled:
        super().run(denoiser, conditions, generators, 2, schedule)
        return super().run(denoiser, conditions, generators, num_inference_steps, schedule)


@pytest.mark.parametrize("scheduler", [DDIMScheduler(), EulerDiscreteScheduler()])  # which says where it is
def test_a_sampler_may_go_on_by_a_longer_schedule(stochastic_model: LoadedModel, scheduler: Any) -> None:
    sampler = _Twice(stochastic_model.denoiser, scheduler)
    found = collect(replace(stochastic_model, sampler=sampler), **{**SMALL, "calibration_steps": 5})
    scheduler.set_timesteps(5)
    assert {found.t.max().item(), found.t.min().item()} == {
        scheduler.timesteps[0].item(),
        scheduler.timesteps[-1].item(),
    }


def test_an_unconditional_model_has_no_labels(stochastic_model: LoadedModel) -> None:
    assert "class_labels" not in collect(stochastic_model, **SMALL).groups[0].tree


def test_progress_counts_every_step(model: LoadedModel) -> None:
    seen: list[tuple[int, int]] = []
    collect(model, **SMALL, batch_size=2, on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i + 1, 15) for i in range(15)], "3 batches of 5 steps"


def test_a_model_that_gives_nan_names_the_time_step(model: LoadedModel) -> None:
    with torch.no_grad():
        model.denoiser.conv_out.bias.fill_(torch.nan)
    with pytest.raises(NonFiniteError, match="timestep = 800"):
        collect(model, **SMALL)


@pytest.mark.parametrize("field", ["samples_per_step", "calibration_steps", "num_inference_steps", "batch_size"])
def test_an_empty_request_names_its_field(model: LoadedModel, field: str) -> None:
    with pytest.raises(UsageError, match=f"'{field}'.*Got 0"):
        collect(model, **{**SMALL, field: 0})


def test_more_calibration_steps_than_inference_steps_are_refused(model: LoadedModel) -> None:
    with pytest.raises(UsageError, match="6 calibration steps must be among the 5"):
        collect(model, samples_per_step=1, calibration_steps=6, num_inference_steps=5)


def test_the_cache_is_reused_until_recipe_or_model_change(model: LoadedModel, tmp_path: Path) -> None:
    runs: list[int] = []

    def cached(loaded: LoadedModel, **changes: Any) -> Calls:
        return collect_cached(
            loaded, tmp_path, on_progress=lambda done, total: runs.append(done), **{**SMALL, **changes}
        )

    first = cached(model)
    made = len(runs)
    assert cached(model).sha256 == first.sha256
    assert cached(model, batch_size=2).sha256 == first.sha256
    assert len(runs) == made, "nothing ran again"
    other_classes = replace(model, sampler=LoopSampler(model.denoiser, DDIMScheduler(), classes=[1]))
    for change in (
        lambda: cached(model, seed=1),
        lambda: cached(replace(model, sha256="another")),
        lambda: cached(other_classes),
    ):
        before = len(runs)
        change()
        assert len(runs) > before
    assert len(list(tmp_path.iterdir())) == 4, "one file each, and no folder of parts is left"


def test_how_a_model_is_sampled_has_one_name_in_all_processes(model: LoadedModel) -> None:
    """diffusers lists the settings that a scheduler's file leaves open, in each process in another order."""
    schedulers = DDIMScheduler(), DDIMScheduler()
    first, second = (replace(model, sampler=LoopSampler(model.denoiser, each, classes=[1])) for each in schedulers)
    left_open = schedulers[0].config["_use_default_values"]
    schedulers[1].register_to_config(_use_default_values=left_open[::-1])
    assert len(left_open) > 1 and make_recipe(first, **SMALL) == make_recipe(second, **SMALL)
    of_run = {"samples": 2, "num_inference_steps": 5, "seed": 0}
    assert baseline_request(first, **of_run) == baseline_request(second, **of_run)


def test_an_interrupted_collection_goes_on_after_its_last_batch(model: LoadedModel, tmp_path: Path) -> None:
    whole = collect_cached(model, tmp_path / "whole", **SMALL, batch_size=2)

    class Stopped(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done > 11:
            raise Stopped

    with pytest.raises(Stopped):
        collect_cached(model, tmp_path / "part", **SMALL, batch_size=2, on_progress=stop)
    seen: list[int] = []
    found = collect_cached(
        model, tmp_path / "part", **SMALL, batch_size=2, on_progress=lambda done, total: seen.append(done)
    )
    assert seen == [11, 12, 13, 14, 15], "two batches of five steps were kept"
    assert found.sha256 == whole.sha256


def test_batches_of_another_size_are_not_taken_for_those_of_an_interrupted_collection(
    model: LoadedModel, tmp_path: Path
) -> None:
    parts = tmp_path / "parts"
    parts.mkdir()
    whole = collect(model, **SMALL, batch_size=2, parts=parts)
    again = collect(model, **SMALL, batch_size=4, parts=parts)
    assert torch.equal(again.trajectory.sort().values, whole.trajectory.sort().values)


def test_a_run_leaves_the_parts_of_another_alone(model: LoadedModel, tmp_path: Path) -> None:
    first = collect_cached(model, tmp_path, **SMALL)
    (path,) = tmp_path.iterdir()
    path.unlink()
    theirs = path.with_suffix(".parts")
    theirs.mkdir()
    with holding(theirs):
        assert collect_cached(model, tmp_path, **SMALL).sha256 == first.sha256
        assert list(theirs.iterdir()) == []
    assert sorted(tmp_path.iterdir()) == sorted([path, theirs])


def test_the_cache_is_reused_where_trajectories_have_fewer_steps_than_thinning(
    model: LoadedModel, tmp_path: Path
) -> None:
    first = collect_cached(model, tmp_path, **SMALL, thinning=99)
    again = collect_cached(model, tmp_path, **SMALL, thinning=99, on_progress=lambda done, total: pytest.fail("ran"))
    assert again.sha256 == first.sha256


def test_a_damaged_cache_is_mended(model: LoadedModel, tmp_path: Path) -> None:
    first = collect_cached(model, tmp_path, **SMALL)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-1])
    assert collect_cached(model, tmp_path, **SMALL).sha256 == first.sha256
    assert Calls.load(path).sha256 == first.sha256


def test_the_cache_folder_follows_the_environment(
    model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PTQ_TDQ_CACHE", str(tmp_path / "elsewhere"))
    collect_cached(model, **SMALL)
    assert len(list((tmp_path / "elsewhere").glob("calls-*.safetensors"))) == 1
    monkeypatch.delenv("PTQ_TDQ_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "ptq-tdq"


def test_a_cache_that_cannot_be_written_is_an_output_error(model: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        collect_cached(model, tmp_path / "file", **SMALL)


def test_noise_of_other_samples_seeds_and_purposes_is_other_noise() -> None:
    keys = [("calibration", 0, 0), ("calibration", 0, 1), ("calibration", 1, 0), ("evaluation", 0, 0)]
    drawn = [torch.randn(4, generator=sample_generator(*key)) for key in keys]
    assert all(not torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])
    assert torch.equal(drawn[0], torch.randn(4, generator=sample_generator(*keys[0])))
