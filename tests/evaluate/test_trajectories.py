"""Comparison of a denoiser with its full-precision reference: identities that hold for any sampler."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler, HeunDiscreteScheduler
from pipelines import PIPELINES
from torch import nn

from ptq_tdq.calib_data import LoadedModel, collect, load_model
from ptq_tdq.calls import prediction
from ptq_tdq.correction import Corrected, Correction
from ptq_tdq.errors import NonFiniteError
from ptq_tdq.evaluate.trajectories import Comparison, compare, make_reference, replay, run
from ptq_tdq.timeaxis import TimeAxis

Tiny = Callable[..., LoadedModel]
Scaled = Callable[[nn.Module, float], nn.Module]


@pytest.mark.parametrize(
    ("scheduler", "classes"), [(DDIMScheduler(), None), (DDPMScheduler(), 3), (FlowMatchEulerDiscreteScheduler(), None)]
)
def test_the_model_itself_differs_in_nothing_at_the_steps_of_its_schedule(
    tiny: Tiny, scheduler: Any, classes: Any
) -> None:
    model = tiny(scheduler, classes, batch=3)
    reference = make_reference(model, samples=4, num_inference_steps=3, seed=5)
    found = compare(reference, model.denoiser)
    scheduler.set_timesteps(3)
    assert found.t == pytest.approx(scheduler.timesteps.tolist(), rel=1e-6)
    assert set(found.noise_sqnr_db) == {math.inf} and found.latent_sqnr_db == math.inf
    assert found.to_dict()["noise_sqnr_db"] == {f"{t:g}": None for t in scheduler.timesteps.tolist()}


def test_a_known_relative_error_has_its_known_ratio_at_each_step(tiny: Tiny, scaled: Scaled) -> None:
    model = tiny()
    reference = make_reference(model, samples=2, num_inference_steps=4, seed=0)
    found = compare(reference, scaled(model.denoiser, 1.01))
    assert found.noise_sqnr_db == pytest.approx([40.0] * 4, abs=0.01)
    assert found.mean_noise_sqnr_db == pytest.approx(40.0, abs=0.01)
    assert math.isfinite(found.latent_sqnr_db)


def test_t_is_that_of_the_denoisers_own_tables(tiny: Tiny, scaled: Scaled) -> None:
    model = tiny()
    reference = make_reference(model, samples=2, num_inference_steps=4, seed=0)
    denoiser = scaled(model.denoiser, 1.01)
    denoiser.axis = TimeAxis("timestep", 1000, 0.5, 100.0)  # type: ignore[assignment]
    model.scheduler.set_timesteps(4)
    assert compare(reference, denoiser).t == pytest.approx([t / 2 + 100 for t in model.scheduler.timesteps.tolist()])


def test_a_step_that_the_sampler_visits_twice_has_one_ratio(tiny: Tiny, scaled: Scaled) -> None:
    """Heun's method calls the denoiser twice at each step but the last."""
    model = tiny(HeunDiscreteScheduler())
    reference = make_reference(model, samples=2, num_inference_steps=3, seed=0)
    found = compare(reference, scaled(model.denoiser, 1.1))
    assert len(reference.calls) == 2 * 5 and list(found.t) == sorted(set(found.t), reverse=True)
    assert found.noise_sqnr_db == pytest.approx([20.0] * 3, abs=0.01)


def test_the_calls_of_the_first_samples_are_kept_and_lead_to_their_latents(tiny: Tiny) -> None:
    """DDIM's update is the textbook's: the last recorded call and its prediction give the final latents."""
    model = tiny(DDIMScheduler(clip_sample=False), classes=3, batch=2)
    reference = make_reference(model, samples=5, num_inference_steps=4, seed=1, recorded=3)
    calls = reference.calls
    assert reference.recorded == 3 and calls.trajectory.unique().tolist() == [0, 1, 2] and len(calls) == 3 * 4
    assert len(reference.latents) == 5 and reference.conditions == [0, 1, 2, 0, 1]
    for sample in range(3):
        row = ((calls.trajectory == sample) & (calls.t == calls.t.min())).nonzero().flatten()
        arguments = calls.inputs(row)
        assert arguments["class_labels"].tolist() == [reference.conditions[sample]]
        alpha = model.scheduler.alphas_cumprod[int(calls.t.min())]
        epsilon = prediction(model.denoiser(**arguments))
        expected = (arguments["sample"] - (1 - alpha).sqrt() * epsilon) / alpha.sqrt()
        torch.testing.assert_close(reference.latents[sample], expected[0], rtol=1e-4, atol=1e-4)


def test_predictions_stand_in_the_order_of_the_calls(tiny: Tiny) -> None:
    model = tiny(classes=3, batch=2)
    reference = make_reference(model, samples=3, num_inference_steps=2, seed=0)
    whole = torch.cat([prediction(model.denoiser(**group.arguments(slice(None)))) for group in reference.calls.groups])
    torch.testing.assert_close(torch.cat(reference.predictions), whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.cat(replay(model.denoiser, reference.calls, 5)), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scheduler", [DDIMScheduler(), DDPMScheduler()])
def test_noise_follows_from_the_seed_and_the_number_of_a_sample_whatever_the_batches(
    tiny: Tiny, scheduler: Any
) -> None:
    few, many, other = (
        make_reference(tiny(scheduler, batch=batch), samples=count, num_inference_steps=3, seed=seed).latents
        for batch, count, seed in ((2, 3, 1), (5, 5, 1), (2, 3, 2))
    )
    torch.testing.assert_close(few, many[:3], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(few[0], few[1], atol=0.1) and not torch.allclose(few, other, atol=0.1)


def test_evaluation_does_not_start_from_the_noise_of_calibration(tiny: Tiny) -> None:
    model = tiny()
    calibration = collect(model, samples_per_step=4, calibration_steps=2, num_inference_steps=2, seed=1)
    evaluation = make_reference(model, samples=4, num_inference_steps=2, seed=1).calls
    starts = [
        calls.groups[0].leaf("sample")[calls.t == calls.t.max()].flatten(1) for calls in (calibration, evaluation)
    ]
    assert len(starts[0]) == len(starts[1]) == 4 and torch.cdist(*starts).min() > 1


def test_a_denoiser_that_breaks_is_an_error_and_no_number(tiny: Tiny, scaled: Scaled) -> None:
    model = tiny()
    with pytest.raises(NonFiniteError, match="NaN or Inf"):
        run(scaled(model.denoiser, math.nan), model, [None, None], 2, 0)


def test_a_comparison_is_json_ready() -> None:
    found = Comparison((999.0, 0.5), (20.0, 30.0), math.inf).to_dict()
    assert found == {
        "latent_sqnr_db": None,
        "mean_noise_sqnr_db": 25.0,
        "noise_sqnr_db": {"999": 20.0, "0.5": 30.0},
    }


@pytest.fixture(scope="module")
def text_to_image(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """Load a saved StableDiffusionPipeline, with guidance and two prompts."""
    folder: Path = tmp_path_factory.mktemp("pipeline")
    next(entry for entry in PIPELINES if entry.name == "StableDiffusionPipeline").save(folder)
    call = {"guidance_scale": 4.0, "height": 16, "width": 16}
    return load_model(str(folder), prompts=["a red fox", "a boat"], call=call)


@pytest.fixture(scope="module")
def transformer() -> LoadedModel:
    """Load the embedded transformer, which predicts velocities."""
    return load_model("reference-dit")


@pytest.mark.parametrize(("name", "rows"), [("text_to_image", 3 * 2), ("transformer", 2)])
def test_any_pipeline_and_any_kind_of_prediction(
    request: pytest.FixtureRequest, scaled: Scaled, name: str, rows: int
) -> None:
    """``rows`` of a sample in two steps: PNDM makes a third call, a guided one has a row without the condition."""
    model: LoadedModel = request.getfixturevalue(name)
    reference = make_reference(model, samples=3, num_inference_steps=2, seed=0, recorded=2)
    assert len(reference.calls) == 2 * rows and reference.recorded == 2
    assert reference.images is not None and len(reference.images) == len(reference.latents) == 3
    found = compare(reference, model.denoiser)
    assert set(found.noise_sqnr_db) == {math.inf} and found.latent_sqnr_db == math.inf and len(found.t) == 2
    worse = compare(reference, scaled(model.denoiser, 1.1))
    assert worse.noise_sqnr_db == pytest.approx([20.0] * 2, abs=0.01) and worse.latent_sqnr_db < 60


def test_samples_show_what_their_prompts_say_whoever_predicts(text_to_image: LoadedModel) -> None:
    model = text_to_image
    reference = make_reference(model, samples=3, num_inference_steps=2, seed=0)
    assert reference.conditions == ["a red fox", "a boat", "a red fox"]
    again = run(model.denoiser, model, ["a red fox", "a red fox", "a red fox"], 2, 0)
    torch.testing.assert_close(again.latents[[0, 2]], reference.latents[[0, 2]])
    assert not torch.allclose(again.latents[1], reference.latents[1], atol=1e-3)


def test_with_eta_a_corrected_model_samples_with_less_noise(tiny: Tiny) -> None:
    """An exact model whose prediction is said to have an error: with none nothing changes, with any the noise does."""
    model = tiny(DDIMScheduler())
    model.sampler.eta = 1.0  # type: ignore[attr-defined]
    once = torch.ones(1, dtype=torch.float64)
    sampled = {}
    for sigma in (0.0, 0.1):
        correction = Correction(once, 0 * once, torch.zeros(1, 3, dtype=torch.float64), once * sigma**2)
        corrected = Corrected(model.denoiser, correction, TimeAxis("timestep"))
        sampled[sigma] = run(corrected, model, model.sampler.conditions(2), 4, 0).latents
    plain = run(model.denoiser, model, model.sampler.conditions(2), 4, 0).latents
    torch.testing.assert_close(sampled[0.0], plain)
    assert (sampled[0.1] - plain).abs().max() > 1e-3
