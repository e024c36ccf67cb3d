from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler, HeunDiscreteScheduler

from ptq_tdq.cache import cache_folder
from ptq_tdq.calib_data import CalibrationSet, LoadedModel, collect, collect_cached, sample_latents
from ptq_tdq.errors import NonFiniteError, OutputError, UsageError

SMALL: dict[str, Any] = {"samples_per_step": 5, "calibration_steps": 3, "num_inference_steps": 5}


def test_the_set_is_ordered_by_step_then_by_trajectory_with_cycling_classes(model: LoadedModel) -> None:
    found = collect(model, **SMALL)
    assert found.x.shape == (15, 3, 8, 8)
    assert found.t.tolist() == [800.0] * 5 + [400.0] * 5 + [0.0] * 5  # DDIM 5: 800, 600, 400, 200, 0
    assert found.class_labels is not None
    assert found.class_labels.tolist() == [0, 1, 2, 0, 1] * 3
    assert found.recipe["samples_per_step"] == 5
    assert found.recipe["samples"] == 15, "the two meanings of '256 samples' are both named"
    assert found.recipe["num_classes"] == 3
    assert found.recipe["model_sha256"] == model.sha256


def test_the_first_step_is_standard_noise(model: LoadedModel) -> None:
    found = collect(model, samples_per_step=64, calibration_steps=1, num_inference_steps=1)
    assert abs(found.x.mean().item()) < 0.03  # 12288 values: standard error 0.009
    assert abs(found.x.std().item() - 1) < 0.03


def test_each_trajectory_is_one_run_of_the_sampler(model: LoadedModel) -> None:
    found = collect(model, **SMALL)
    start, middle = found.x[:5], found.x[5:10]
    seen = []
    sample_latents(
        model.unet,
        model.scheduler,
        noise=start,
        num_inference_steps=5,
        class_labels=torch.tensor([0, 1, 2, 0, 1]),
        on_step=lambda index, t, x: seen.append(x),
    )
    assert torch.allclose(seen[1], middle, atol=1e-5), "x after the second step is what the third step receives"


@pytest.mark.parametrize("name", ["model", "stochastic_model"])
def test_the_result_does_not_depend_on_the_batch_size(name: str, request: pytest.FixtureRequest) -> None:
    loaded = request.getfixturevalue(name)
    whole, split = (collect(loaded, **SMALL, batch_size=size) for size in (64, 2))
    assert torch.allclose(whole.x, split.x, atol=1e-4)
    assert torch.equal(whole.t, split.t)
    assert whole.recipe == split.recipe


def test_the_first_trajectories_stay_the_same_when_more_are_asked_for(stochastic_model: LoadedModel) -> None:
    few, more = (
        collect(stochastic_model, samples_per_step=n, calibration_steps=2, num_inference_steps=3) for n in (2, 4)
    )
    assert torch.allclose(few.x.unflatten(0, (2, 2)), more.x.unflatten(0, (2, 4))[:, :2], atol=1e-5)


def test_same_seed_same_bytes_other_seed_other_bytes(model: LoadedModel) -> None:
    assert collect(model, **SMALL).sha256 == collect(model, **SMALL).sha256
    assert collect(model, **SMALL).sha256 != collect(model, **SMALL, seed=1).sha256


def test_normal_steps_differ_between_trajectories_and_stay_in_sampling_order(model: LoadedModel) -> None:
    found = collect(model, samples_per_step=6, calibration_steps=4, num_inference_steps=20, step_distribution="normal")
    t = found.t.unflatten(0, (4, 6))
    assert (t.diff(dim=0) < 0).all()
    assert len({tuple(column.tolist()) for column in t.unbind(1)}) > 1


def test_trajectories_are_the_same_whichever_steps_are_kept(model: LoadedModel) -> None:
    everything = {"samples_per_step": 3, "calibration_steps": 4, "num_inference_steps": 4}
    uniform, normal = (collect(model, **everything, step_distribution=name) for name in ("uniform", "normal"))
    assert torch.equal(uniform.x, normal.x)


@pytest.mark.parametrize("scheduler", [EulerDiscreteScheduler(use_karras_sigmas=True), HeunDiscreteScheduler()])
def test_other_samplers_fractional_and_repeated_time_steps(model: LoadedModel, scheduler: Any) -> None:
    found = collect(replace(model, scheduler=scheduler), **SMALL)
    scheduler.set_timesteps(5)
    assert set(found.t.tolist()) <= set(scheduler.timesteps.float().tolist())
    assert found.t[0] == 999
    assert found.x[:5].abs().max() < 6, "the U-Net receives scaled noise, not the sampler's own state of many sigma"


def test_an_unconditional_model_has_no_labels(stochastic_model: LoadedModel) -> None:
    assert collect(stochastic_model, **SMALL).class_labels is None


def test_progress_counts_every_call_of_the_unet(model: LoadedModel) -> None:
    seen: list[tuple[int, int]] = []
    collect(model, **SMALL, batch_size=2, on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i + 1, 15) for i in range(15)], "3 batches of 5 steps"


def test_a_model_that_returns_nan_names_the_time_step(model: LoadedModel) -> None:
    with torch.no_grad():
        model.unet.conv_out.bias.fill_(torch.nan)
    with pytest.raises(NonFiniteError, match="t = 800"):
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

    def cached(loaded: LoadedModel, **changes: Any) -> CalibrationSet:
        return collect_cached(
            loaded, tmp_path, on_progress=lambda done, total: runs.append(done), **{**SMALL, **changes}
        )

    first = cached(model)
    made = len(runs)
    assert cached(model).sha256 == first.sha256
    assert cached(model, batch_size=2).sha256 == first.sha256
    assert len(runs) == made, "nothing ran again"

    for change in (lambda: cached(model, seed=1), lambda: cached(replace(model, sha256="another"))):
        before = len(runs)
        change()
        assert len(runs) > before
    assert len(list(tmp_path.iterdir())) == 3


def test_a_damaged_cache_is_mended(model: LoadedModel, tmp_path: Path) -> None:
    first = collect_cached(model, tmp_path, **SMALL)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-1])
    assert collect_cached(model, tmp_path, **SMALL).sha256 == first.sha256
    assert CalibrationSet.load(path).sha256 == first.sha256


def test_the_cache_folder_follows_the_environment(
    model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PTQ_TDQ_CACHE", str(tmp_path / "elsewhere"))
    collect_cached(model, **SMALL)
    assert len(list((tmp_path / "elsewhere").glob("calibration-*.safetensors"))) == 1
    monkeypatch.delenv("PTQ_TDQ_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "ptq-tdq"


def test_a_cache_that_cannot_be_written_is_an_output_error(model: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        collect_cached(model, tmp_path / "file", **SMALL)
