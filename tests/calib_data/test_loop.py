"""The plain sampling loop against the sums that diffusers publishes in its tests/schedulers/test_scheduler_*.py."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from denoisers import DENOISERS
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DDPMWuerstchenScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    SCMScheduler,
    UnCLIPScheduler,
    UNet2DConditionModel,
    UNet2DModel,
)
from torch import Tensor

from ptq_tdq.calib_data import LoopSampler, finite_outputs, new_schedule
from ptq_tdq.calib_data.loop import start_schedule, step_through
from ptq_tdq.errors import ConfigError, ModelError, NonFiniteError

LINEAR: dict[str, Any] = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
DPM: dict[str, Any] = {
    "algorithm_type": "dpmsolver++",
    "solver_type": "midpoint",
    "solver_order": 2,
    "lower_order_final": False,
    "final_sigmas_type": "sigma_min",  # the only behaviour there was when the numbers were published
}


def dummy(sample: Tensor, t: Tensor) -> Tensor:
    """The dummy model of diffusers' tests/schedulers/test_schedulers.py."""
    return sample * t / (t + 1)


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(count)]


@pytest.mark.parametrize(
    ("scheduler", "steps", "calls", "published_mean", "published_sum"),
    [
        # test_scheduler_ddim.py: test_full_loop_no_noise, test_full_loop_with_v_prediction
        (DDIMScheduler(**LINEAR), 10, 10, 0.223967, 172.0067),
        (DDIMScheduler(**LINEAR, prediction_type="v_prediction"), 10, 10, 0.0684, 52.5302),
        # test_scheduler_pndm.py: test_full_loop_no_noise; 12 Runge-Kutta calls for the first three steps, then 7
        (PNDMScheduler(**LINEAR), 10, 19, 0.2580, 198.1318),
        # test_scheduler_dpm_multi.py: test_full_loop_no_noise, test_full_loop_with_v_prediction (means only)
        (DPMSolverMultistepScheduler(**LINEAR, **DPM), 10, 10, 0.3301, None),
        (DPMSolverMultistepScheduler(**LINEAR, **DPM, prediction_type="v_prediction"), 10, 10, 0.2251, None),
    ],
)
def test_published_sums_hold(
    dummy_sample: Tensor, scheduler: Any, steps: int, calls: int, published_mean: float, published_sum: float | None
) -> None:
    seen: list[Tensor] = []

    def predict(x: Tensor, t: Tensor) -> Tensor:
        seen.append(t)
        return dummy(x, t)

    start_schedule(scheduler, steps)
    final = step_through(predict, dummy_sample, scheduler)
    assert abs(final.abs().mean().item() - published_mean) < 1e-3
    if published_sum is not None:
        assert abs(final.abs().sum().item() - published_sum) < 1e-2
    assert len(seen) == calls


def test_published_sums_hold_for_a_sampler_that_adds_noise(dummy_sample: Tensor) -> None:
    """test_scheduler_ddpm.py: test_full_loop_no_noise, 1000 steps, one generator for the batch."""
    scheduler = DDPMScheduler(**LINEAR, variance_type="fixed_small")
    start_schedule(scheduler, 1000)
    generator = torch.manual_seed(0)
    x = dummy_sample
    for t in scheduler.timesteps:  # as published: the loop itself takes a generator per sample
        x = scheduler.step(dummy(x, t), t, x, generator=generator).prev_sample
    assert abs(x.abs().sum().item() - 258.9606) < 1e-2
    per_sample = step_through(dummy, dummy_sample, scheduler, generators(4))
    alone = step_through(dummy, dummy_sample[2:], scheduler, generators(4)[2:])
    assert torch.allclose(per_sample[2:], alone), "a sample's noise is its own"


@pytest.mark.parametrize(
    "scheduler",
    [
        EulerDiscreteScheduler(**LINEAR, timestep_spacing="linspace"),
        EulerDiscreteScheduler(**LINEAR, timestep_spacing="linspace", use_karras_sigmas=True),
        HeunDiscreteScheduler(**LINEAR, timestep_spacing="linspace"),
    ],
    ids=["euler", "euler-karras", "heun"],
)
def test_x_t_has_the_noise_level_of_its_possibly_fractional_t(scheduler: Any) -> None:
    """For zero data x_t = sqrt(1 - alpha_bar_t) * noise at every t (arXiv 2006.11239, eq. 4), and x_0 = 0."""
    noise = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    seen: list[tuple[float, Tensor]] = []

    def ideal(x: Tensor, t: Tensor) -> Tensor:
        seen.append((t.item(), x))
        return noise

    start_schedule(scheduler, 7)
    final = step_through(ideal, noise, scheduler)
    levels = (1 - scheduler.alphas_cumprod).sqrt()
    for t, x in seen:
        level = torch.lerp(levels[int(t)], levels[min(int(t) + 1, 999)], t - int(t))
        assert torch.allclose(x, level * noise, atol=2e-3)
    assert any(t % 1 for t, _ in seen), "these schedules have fractional t"
    assert torch.allclose(final, torch.zeros_like(final), atol=1e-4), "157 sigma in float32"


def test_flow_matching_ends_at_the_data_of_an_ideal_model() -> None:
    """For data x_0 the velocity is noise - x_0 everywhere on the straight way, whatever the steps."""
    noise, data = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).unbind()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    start_schedule(scheduler, 5)
    assert torch.allclose(step_through(lambda x, t: noise - data, noise, scheduler), data, atol=1e-5)


@pytest.mark.parametrize(
    ("pipeline_class", "scheduler"), [(DDPMPipeline, DDPMScheduler()), (DDIMPipeline, DDIMScheduler())]
)
def test_the_sampler_agrees_with_diffusers_own_pipelines(
    unet: UNet2DModel, pipeline_class: Any, scheduler: Any
) -> None:
    pipeline = pipeline_class(unet=unet, scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(batch_size=2, num_inference_steps=4, generator=generators(2), output_type="np").images
    sampler = LoopSampler(unet, scheduler)
    mine = sampler.run(unet, sampler.conditions(2), generators(2), 4, new_schedule(sampler))
    assert mine.images is not None
    assert torch.allclose(torch.from_numpy(images), (mine.images / 2 + 0.5).permute(0, 2, 3, 1), atol=1e-5)


def test_mixed_classes_are_sampled_as_each_class_alone(model: Any) -> None:
    sampler = model.sampler

    def run(classes: list[int], rows: slice) -> Tensor:
        found: Tensor = sampler.run(model.denoiser, classes, generators(3)[rows], 3, new_schedule(sampler)).latents
        return found

    together = run([2, 0, 1], slice(0, 3))
    for i, label in enumerate([2, 0, 1]):
        assert torch.allclose(together[i], run([label], slice(i, i + 1))[0], atol=1e-4)
    assert not torch.allclose(together, run([1, 0, 2], slice(0, 3)))


def test_the_scheduler_itself_stays_as_it_was(model: Any) -> None:
    before = copy.deepcopy(model.scheduler.timesteps)
    model.sampler.run(model.denoiser, [0], generators(1), 4, new_schedule(model.sampler))
    assert torch.equal(model.scheduler.timesteps, before)


def test_sounds_have_the_shape_of_a_one_dimensional_model() -> None:
    unet = next(entry for entry in DENOISERS if entry.name == "UNet1DModel").build()
    sampler = LoopSampler(unet, DDPMScheduler())
    found = sampler.run(unet, [None, None], generators(2), 2, new_schedule(sampler))
    assert found.latents.shape == (2, unet.config.in_channels, unet.config.sample_size)
    assert found.images is None


def test_a_model_that_breaks_down_names_the_time_step_and_the_layer(model: Any) -> None:
    with torch.no_grad():
        model.denoiser.conv_out.bias.fill_(torch.nan)
    with (
        pytest.raises(NonFiniteError, match="timestep = 750, first in conv_out"),
        finite_outputs(model.denoiser),
    ):
        model.sampler.run(model.denoiser, [0], generators(1), 4, new_schedule(model.sampler))


@pytest.mark.parametrize("sample_size", [10**7, 10**9])  # more than there is memory, than torch can count
def test_samples_that_no_memory_holds_are_one_sentence(unet: UNet2DModel, sample_size: int) -> None:
    unet.register_to_config(sample_size=sample_size)
    sampler = LoopSampler(unet, DDIMScheduler())
    with pytest.raises(ModelError, match=rf"1 samples of shape \[3, {sample_size}, .* correct sample_size"):
        sampler.run(unet, [None], generators(1), 1, new_schedule(sampler))


@pytest.mark.parametrize("steps", [0, -3, 1001])
def test_an_impossible_number_of_steps_is_refused(steps: int) -> None:
    with pytest.raises(ConfigError, match=str(steps)):
        start_schedule(DDIMScheduler(), steps)


def test_a_schedule_that_no_number_of_steps_fits_is_one_sentence() -> None:
    with pytest.raises(ConfigError, match="DDPMScheduler cannot run 2 inference steps; choose another"):
        start_schedule(DDPMScheduler(steps_offset="x"), 2)


def test_a_denoiser_that_needs_more_says_so() -> None:
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4, cross_attention_dim=8,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",), attention_head_dim=4,
    )  # fmt: skip
    sampler = LoopSampler(unet, DDIMScheduler())
    with pytest.raises(ModelError, match=r"encoder_hidden_states.*pass the folder of its pipeline"):
        sampler.run(unet, [None], generators(1), 2, new_schedule(sampler))


@pytest.mark.parametrize(
    ("scheduler", "variance"),
    [
        (DDPMScheduler(variance_type="learned_range"), True),
        (UnCLIPScheduler(variance_type="learned_range"), True),
        (DPMSolverMultistepScheduler(variance_type="learned_range", algorithm_type="sde-dpmsolver++"), False),
        (DDPMScheduler(), False),
    ],
)
def test_a_learned_variance_is_read_by_schedulers_that_do(scheduler: Any, variance: bool) -> None:
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, out_channels=6, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    )  # fmt: skip
    sampler = LoopSampler(unet, scheduler)

    def latents() -> Tensor:
        return sampler.run(unet, [None], generators(1), 4, new_schedule(sampler)).latents

    before = latents()
    unet.conv_out.bias.data[3:] += 10
    assert bool(before.isfinite().all()) and torch.equal(before, latents()) == (not variance)


@pytest.mark.parametrize("scheduler", [SCMScheduler(), DDPMWuerstchenScheduler()])
def test_a_scheduler_whose_steps_need_more_says_so(unet: UNet2DModel, scheduler: Any) -> None:
    sampler = LoopSampler(unet, scheduler)
    with pytest.raises(ConfigError, match=r"does not step from t = \d.*sample with another scheduler"):
        sampler.run(unet, [None], generators(1), 2, new_schedule(sampler))


@pytest.mark.parametrize("classes", [[3], [-1, 0], []])
def test_classes_out_of_range_are_refused(model: Any, classes: list[int]) -> None:
    with pytest.raises(ConfigError, match="classes must be numbers from 0 to 2"):
        LoopSampler(model.denoiser, model.scheduler, classes=classes)


def test_classes_of_an_unconditional_model_are_refused(unet: UNet2DModel) -> None:
    with pytest.raises(ConfigError, match="takes no classes"):
        LoopSampler(unet, DDIMScheduler(), classes=[0])


def test_eta_is_that_of_diffusers_own_pipeline(unet: UNet2DModel) -> None:
    pipeline = DDIMPipeline(unet=unet, scheduler=DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(batch_size=2, generator=generators(2), num_inference_steps=4, eta=1.0, output_type="np")[0]
    sampler = LoopSampler(unet, pipeline.scheduler, eta=1.0)
    mine = sampler.run(unet, sampler.conditions(2), generators(2), 4, new_schedule(sampler))
    assert mine.images is not None
    torch.testing.assert_close(mine.images.permute(0, 2, 3, 1) / 2 + 0.5, torch.from_numpy(expected), atol=1e-4, rtol=0)
    assert sampler.recipe()["call"] == {"eta": 1.0} and "call" not in LoopSampler(unet, DDIMScheduler()).recipe()


@pytest.mark.parametrize("eta", [-0.1, 1.5, "x", True, None])
def test_an_eta_that_is_no_share_is_refused(unet: UNet2DModel, eta: Any) -> None:
    with pytest.raises(ConfigError, match="eta must be a number from 0 to 1"):
        LoopSampler(unet, DDIMScheduler(), eta=eta)


def test_a_scheduler_without_eta_refuses_it(unet: UNet2DModel) -> None:
    sampler = LoopSampler(unet, DDPMScheduler(), eta=0.5)
    with pytest.raises(ConfigError, match="DDPMScheduler has no eta"):
        sampler.run(unet, sampler.conditions(1), generators(1), 2, new_schedule(sampler))
