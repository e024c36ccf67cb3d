"""The sampling loop against the sums that diffusers publishes in its tests/schedulers/test_scheduler_*.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UNet2DModel,
)
from torch import Tensor, nn

from ptq_tdq.calib_data import Recorder, sample_latents
from ptq_tdq.errors import ConfigError, NonFiniteError, UsageError

LINEAR: dict[str, Any] = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
DPM: dict[str, Any] = {
    "algorithm_type": "dpmsolver++",
    "solver_type": "midpoint",
    "solver_order": 2,
    "lower_order_final": False,
    "final_sigmas_type": "sigma_min",  # the only behaviour there was when the numbers were published
}


@pytest.mark.parametrize(
    ("scheduler", "steps", "calls", "published_mean", "published_sum"),
    [
        # test_scheduler_ddim.py: test_full_loop_no_noise, test_full_loop_with_v_prediction
        (DDIMScheduler(**LINEAR), 10, 10, 0.223967, 172.0067),
        (DDIMScheduler(**LINEAR, prediction_type="v_prediction"), 10, 10, 0.0684, 52.5302),
        # test_scheduler_ddpm.py: test_full_loop_no_noise
        (DDPMScheduler(**LINEAR, variance_type="fixed_small"), 1000, 1000, 0.3372, 258.9606),
        # test_scheduler_pndm.py: test_full_loop_no_noise; 12 Runge-Kutta calls for the first three steps, then 7
        (PNDMScheduler(**LINEAR), 10, 19, 0.2580, 198.1318),
        # test_scheduler_dpm_multi.py: test_full_loop_no_noise, test_full_loop_with_v_prediction (means only)
        (DPMSolverMultistepScheduler(**LINEAR, **DPM), 10, 10, 0.3301, None),
        (DPMSolverMultistepScheduler(**LINEAR, **DPM, prediction_type="v_prediction"), 10, 10, 0.2251, None),
    ],
)
def test_published_sums_hold_through_the_recorder_and_the_loop(
    dummy: nn.Module,
    dummy_sample: Tensor,
    scheduler: Any,
    steps: int,
    calls: int,
    published_mean: float,
    published_sum: float | None,
) -> None:
    recorder = Recorder(dummy)
    generator = torch.Generator().manual_seed(0)
    final = sample_latents(recorder, scheduler, noise=dummy_sample, num_inference_steps=steps, generator=generator)
    assert abs(final.abs().mean().item() - published_mean) < 1e-3
    if published_sum is not None:
        assert abs(final.abs().sum().item() - published_sum) < 1e-2
    assert recorder.calls == len(recorder.records) == calls


@pytest.mark.parametrize(
    ("scheduler", "published_sum", "published_mean"),
    [
        (EulerDiscreteScheduler(num_train_timesteps=1100, **LINEAR), 10.0807, 0.0131),  # test_scheduler_euler.py
        (HeunDiscreteScheduler(num_train_timesteps=1100, **LINEAR), 0.1233, 0.0002),  # test_scheduler_heun.py
    ],
)
def test_published_sums_hold_when_another_loop_drives_the_recorder(
    dummy: nn.Module, dummy_sample: Tensor, scheduler: Any, published_sum: float, published_mean: float
) -> None:
    """The published loop of these two carries the scaled sample on, unlike any pipeline, so it is driven as printed."""
    recorder = Recorder(dummy)
    scheduler.set_timesteps(10)
    sample = dummy_sample * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        sample = scheduler.scale_model_input(sample, t)
        sample = scheduler.step(recorder(sample, t)[0], t, sample).prev_sample
    assert abs(sample.abs().sum().item() - published_sum) < 1e-2
    assert abs(sample.abs().mean().item() - published_mean) < 1e-3
    recorded = torch.stack([record.t[0] for record in recorder.records])
    assert torch.equal(recorded, scheduler.timesteps.float())


class ConstantNoise(nn.Module):
    """The ideal model of data that are all zero: x_t is its starting noise, scaled."""

    def __init__(self, noise: Tensor) -> None:
        super().__init__()
        self.noise = noise

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        return (self.noise,)


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
    recorder = Recorder(ConstantNoise(noise))
    final = sample_latents(recorder, scheduler, noise=noise, num_inference_steps=7)
    levels = (1 - scheduler.alphas_cumprod).sqrt()
    for record in recorder.records:
        t = record.t[0].item()
        low = int(t)
        level = torch.lerp(levels[low], levels[min(low + 1, 999)], t - low)
        assert torch.allclose(record.x, level * noise, atol=2e-3)
    assert any(record.t[0].item() % 1 for record in recorder.records), "these schedules have fractional t"
    assert torch.allclose(final, torch.zeros_like(final), atol=1e-4), "157 sigma in float32"


def test_the_loop_agrees_with_diffusers_own_pipelines(unet: UNet2DModel) -> None:
    for pipeline_class, scheduler in ((DDPMPipeline, DDPMScheduler()), (DDIMPipeline, DDIMScheduler())):
        recorder = Recorder(unet)
        pipeline = pipeline_class(unet=recorder, scheduler=scheduler)
        pipeline.set_progress_bar_config(disable=True)
        images = pipeline(
            batch_size=2, num_inference_steps=4, generator=torch.Generator().manual_seed(1), output_type="np"
        ).images
        generator = torch.Generator().manual_seed(1)
        noise = torch.randn(2, 3, 8, 8, generator=generator)
        own = Recorder(unet)
        final = sample_latents(own, scheduler, noise=noise, num_inference_steps=4, generator=generator)
        mapped = (final / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
        assert torch.allclose(torch.from_numpy(images), mapped, atol=1e-5)
        for seen, ours in zip(recorder.records, own.records, strict=True):
            assert torch.equal(seen.t, ours.t)
            assert torch.allclose(seen.x, ours.x, atol=1e-5)


def test_recording_changes_nothing(unet: UNet2DModel) -> None:
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    recorder = Recorder(unet)
    assert torch.equal(recorder(x, 7).sample, unet(x, 7).sample)
    assert torch.equal(recorder(x, torch.tensor([7, 9]), return_dict=False)[0], unet(x, torch.tensor([7, 9])).sample)
    assert recorder.config is unet.config
    assert (recorder.dtype, recorder.device) == (unet.dtype, unet.device)
    assert [record.t.tolist() for record in recorder.records] == [[7, 7], [7, 9]]
    with pytest.raises(AttributeError):
        _ = recorder.no_such_attribute


def test_records_are_copies(dummy: nn.Module) -> None:
    x = torch.ones(1, 3, 4, 4)
    recorder = Recorder(dummy)
    recorder(x, torch.tensor(3))
    x.zero_()
    assert recorder.records[0].x.eq(1).all()


def test_only_the_wanted_rows_are_kept(dummy: nn.Module) -> None:
    wanted = torch.tensor([[True, False], [False, False], [True, True]])
    recorder = Recorder(dummy, wanted)
    labels = torch.tensor([4, 5])
    for t in (9, 5, 1):
        recorder(torch.full((2, 3, 4, 4), float(t)), torch.tensor(t), class_labels=labels)
    kept = [(record.step_index, record.rows.tolist(), record.t.tolist()) for record in recorder.records]
    assert kept == [(0, [0], [9.0]), (2, [0, 1], [1.0, 1.0])]
    assert recorder.records[0].class_labels is not None
    assert recorder.records[0].class_labels.tolist() == [4]
    with pytest.raises(UsageError, match="a run of 3 calls"):
        recorder(torch.zeros(2, 3, 4, 4), torch.tensor(0))


def test_a_batch_of_another_size_is_refused(dummy: nn.Module) -> None:
    with pytest.raises(UsageError, match="a batch of 2 but got 3"):
        Recorder(dummy, torch.ones(1, 2, dtype=torch.bool))(torch.zeros(3, 3, 4, 4), torch.tensor(0))


def test_mixed_classes_are_sampled_as_each_class_alone(model: Any) -> None:
    noise = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([2, 0, 1])
    options = {"num_inference_steps": 3}
    together = sample_latents(model.unet, model.scheduler, noise=noise, class_labels=labels, **options)
    for i in range(3):
        alone = sample_latents(
            model.unet, model.scheduler, noise=noise[i : i + 1], class_labels=labels[i : i + 1], **options
        )
        assert torch.allclose(together[i], alone[0], atol=1e-4)
    assert not torch.allclose(
        together, sample_latents(model.unet, model.scheduler, noise=noise, class_labels=labels.flip(0), **options)
    )


def test_eta_reaches_ddim_and_only_ddim(dummy: nn.Module, dummy_sample: Tensor) -> None:
    def run(scheduler: Any, eta: float) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return sample_latents(dummy, scheduler, noise=dummy_sample, num_inference_steps=5, generator=generator, eta=eta)

    assert not torch.allclose(run(DDIMScheduler(), 0.0), run(DDIMScheduler(), 1.0))
    for scheduler in (EulerAncestralDiscreteScheduler(), PNDMScheduler()):
        assert torch.equal(run(scheduler, 0.0), run(scheduler, 1.0))


def test_one_generator_per_sample_makes_samples_independent_of_the_batch(
    dummy: nn.Module, dummy_sample: Tensor
) -> None:
    def run(rows: slice) -> Tensor:
        generators = [torch.Generator().manual_seed(i) for i in range(4)][rows]
        return sample_latents(
            dummy, DDPMScheduler(), noise=dummy_sample[rows], num_inference_steps=6, generator=generators
        )

    assert torch.allclose(run(slice(0, 4))[2:], run(slice(2, 4)))


def test_the_callback_sees_every_step_and_the_scheduler_stays_as_it_was(dummy: nn.Module, dummy_sample: Tensor) -> None:
    scheduler = EulerDiscreteScheduler()
    before = scheduler.timesteps.clone()
    seen: list[tuple[int, float]] = []
    latents: list[Tensor] = []

    def on_step(index: int, t: float, x: Tensor) -> None:
        seen.append((index, t))
        latents.append(x)

    final = sample_latents(dummy, scheduler, noise=dummy_sample, num_inference_steps=4, on_step=on_step)
    assert [index for index, _ in seen] == [0, 1, 2, 3]
    assert [t for _, t in seen] == [999.0, 666.0, 333.0, 0.0]
    assert torch.equal(latents[-1], final)
    assert torch.equal(scheduler.timesteps, before)


class FailsAt(nn.Module):
    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        return (sample / (timestep != 400),)


def test_a_model_that_breaks_down_names_the_time_step(dummy_sample: Tensor) -> None:
    with pytest.raises(NonFiniteError, match="t = 400"):
        sample_latents(FailsAt(), DDIMScheduler(), noise=dummy_sample, num_inference_steps=5)


@pytest.mark.parametrize("steps", [0, -3, 1001])
def test_an_impossible_number_of_steps_is_refused(dummy: nn.Module, dummy_sample: Tensor, steps: int) -> None:
    with pytest.raises(ConfigError, match=str(steps)):
        sample_latents(dummy, DDIMScheduler(), noise=dummy_sample, num_inference_steps=steps)
