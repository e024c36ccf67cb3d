"""PTQD's correction: its parts are recovered from synthetic errors, and applying it undoes them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from torch import Tensor, nn

from ptq_tdq.correction import (
    Corrected,
    Correction,
    ddim_coefficient,
    fit_correction,
    lowered_variance,
)
from ptq_tdq.timeaxis import TimeAxis
from ptq_tdq.timed_model import TimedModel

TIMES = torch.tensor([10.0, 400.0, 900.0])
K = torch.tensor([0.05, -0.1, 0.3], dtype=torch.float64)
MU = torch.tensor([[0.1, -0.2, 0.0], [0.0, 0.5, 0.1], [-0.3, 0.2, 0.4]], dtype=torch.float64)


def calls(sigma: float, count: int = 40, batch: int = 8, noise: bool = True) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Predictions with the model's own error at three mixed time steps."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        step = torch.randint(3, (batch,), generator=generator)
        full = torch.randn(batch, 3, 6, 6, generator=generator, dtype=torch.float64) + 0.7
        d = MU[step].view(batch, 3, 1, 1) + sigma * torch.randn(full.shape, generator=generator, dtype=torch.float64)
        yield TIMES[step], full, full + K[step].view(-1, 1, 1, 1) * full + d


def test_gain_mean_and_variance_are_recovered() -> None:
    exact = fit_correction(calls(0.0))
    assert exact.t.tolist() == TIMES.tolist()
    torch.testing.assert_close(exact.k, K)
    torch.testing.assert_close(exact.mu, MU)
    assert exact.variance.max() < 1e-12
    noisy = fit_correction(calls(0.2))
    torch.testing.assert_close(noisy.k, K, atol=0.01, rtol=0)
    torch.testing.assert_close(noisy.mu, MU, atol=0.02, rtol=0)
    torch.testing.assert_close(noisy.variance, torch.full((3,), 0.04, dtype=torch.float64), rtol=0.05, atol=0)


def test_the_fit_is_the_textbook_s_least_squares() -> None:
    found = list(calls(0.3))
    mine = fit_correction(found)
    full = torch.cat([f[t == 400] for t, f, _ in found])
    error = torch.cat([(q - f)[t == 400] for t, f, q in found])
    channel = torch.arange(3).view(1, 3, 1, 1).expand_as(full)
    design = torch.stack([full, *((channel == c).double() for c in range(3))], -1).flatten(0, -2)
    solved = torch.linalg.lstsq(design, error.flatten()[:, None]).solution[:, 0]
    torch.testing.assert_close(mine.k[1], solved[0])
    torch.testing.assert_close(mine.mu[1], solved[1:])
    residual = error.flatten() - design @ solved
    torch.testing.assert_close(mine.variance[1], residual.square().mean())


def test_the_order_and_the_size_of_the_calls_change_nothing() -> None:
    found = list(calls(0.3))
    whole = tuple(torch.cat(parts) for parts in zip(*found, strict=True))
    a, b = fit_correction(found), fit_correction([whole])  # type: ignore[list-item]
    for name in ("t", "k", "mu", "variance"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name))


def test_correcting_undoes_mean_and_gain_but_never_amplifies() -> None:
    correction = fit_correction(calls(0.0))
    for t, full, quantized in calls(0.0, count=3):
        mended = correction.apply(quantized, t)
        step = torch.searchsorted(TIMES, t)
        expected = full * torch.where(K[step] < 0, 1 + K[step], 1.0).view(-1, 1, 1, 1)
        torch.testing.assert_close(mended, expected)
    assert correction.gain.tolist() == pytest.approx([1.05, 1.0, 1.3])


def test_no_error_needs_no_correction() -> None:
    correction = fit_correction((t, full, full) for t, full, _ in calls(0.0))
    assert not correction.k.any() and not correction.mu.any() and not correction.variance.any()
    silent = fit_correction([(torch.tensor([3.0]), torch.zeros(1, 2, 4, 4), torch.ones(1, 2, 4, 4))])
    assert silent.k.tolist() == [0.0] and silent.mu.tolist() == [[1.0, 1.0]], "without a signal there is no gain"
    with pytest.raises(ValueError, match="at least one call"):
        fit_correction([])


def test_between_observed_steps_it_is_linear_and_beyond_them_constant() -> None:
    correction = fit_correction(calls(0.0))
    t = torch.tensor([0.0, 10.0, 205.0, 400.0, 650.0, 900.0, 999.0])
    expected = torch.tensor([0.05, 0.05, -0.025, -0.1, 0.1, 0.3, 0.3], dtype=torch.float64)
    torch.testing.assert_close(correction.at(correction.k, t), expected)
    single = Correction(TIMES[:1].double(), K[:1], MU[:1], K[:1])
    assert single.at(single.mu, t).shape == (7, 3)


def halved() -> Correction:
    """A correction that takes 0.5 away and halves what is left."""
    return Correction(TIMES.double(), torch.ones(3).double(), torch.full((3, 3), 0.5).double(), torch.ones(3))


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_corrected_model_keeps_the_call_signature(tiny_unet: Callable[..., UNet2DModel], wrapped: bool) -> None:
    unet, axis = tiny_unet(), TimeAxis("timestep")
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    corrected = Corrected(TimedModel(unet, axis) if wrapped else unet, halved(), axis)
    expected = (unet(x, 10).sample - 0.5) / 2
    torch.testing.assert_close(corrected(x, 10).sample, expected)
    torch.testing.assert_close(corrected(sample=x, timestep=torch.tensor(10)).sample, expected)
    torch.testing.assert_close(corrected(x, torch.tensor([10, 10]), return_dict=False)[0], expected)
    assert corrected.config is unet.config and corrected(x, 10).sample.dtype == corrected.dtype == torch.float32


class Sigmas(nn.Module):
    """A denoiser of another kind: it is told t / 1000 and gives a list with one tensor per sample."""

    def forward(self, latents: list[Tensor], t: Tensor) -> tuple[list[Tensor], int]:
        return [x * (1 + time) for x, time in zip(latents, t, strict=True)], 7


def test_t_is_read_from_the_model_s_own_argument_and_any_output_is_corrected() -> None:
    moved = Correction(TIMES.double(), torch.zeros(3).double(), MU, torch.ones(3))
    corrected = Corrected(Sigmas(), moved, TimeAxis("t", 1000, 1000.0))
    latents = [torch.full((3, 2, 2), value) for value in (1.0, 2.0)]
    found, other = corrected(latents, t=torch.tensor([0.9, 0.4]))
    assert other == 7 and isinstance(found, list)
    torch.testing.assert_close(found[0].double(), torch.full((3, 2, 2), 1.9).double() - MU[2].view(3, 1, 1))
    torch.testing.assert_close(found[1].double(), torch.full((3, 2, 2), 2.8).double() - MU[1].view(3, 1, 1))


@dataclass
class Plain:
    scale: float
    latents: Tensor
    mask: Tensor


class Dataclasses(nn.Module):
    def forward(self, x: Tensor, t: Tensor) -> Plain:
        return Plain(3.0, 2 * x, x)


def test_an_output_that_is_a_dataclass_is_corrected() -> None:
    x = torch.randn(2, 3, 4, 4)
    found = Corrected(Dataclasses(), halved(), TimeAxis("t"))(x, torch.tensor([10.0, 400.0]))
    assert isinstance(found, Plain) and found.scale == 3 and found.mask is x
    torch.testing.assert_close(found.latents, (2 * x - 0.5) / 2)


@pytest.mark.parametrize("remaining", [0.0, 0.01, 1.0, 1e9])
def test_the_sampler_s_variance_is_lowered_and_never_negative(remaining: float) -> None:
    sampler, coefficient = torch.linspace(0, 1, 11), torch.linspace(-3, 3, 11)
    found = lowered_variance(sampler, coefficient, torch.tensor(remaining))
    assert (found >= 0).all() and (found <= sampler).all()
    if remaining == 0:
        assert torch.equal(found, sampler)


def test_lowered_noise_and_remaining_error_add_up_to_the_sampler_s_own_variance() -> None:
    sampler, coefficient, remaining = torch.tensor(0.5), torch.tensor(-0.4), torch.tensor(0.7)
    assert lowered_variance(sampler, coefficient, remaining) + coefficient**2 * remaining == pytest.approx(0.5)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_error_and_lowered_noise_together_have_the_sampler_s_own_variance(prediction: str) -> None:
    """A DDIM step with eta = 1 from a prediction with noise in it spreads as a step from one without."""
    scheduler = DDIMScheduler(clip_sample=False, prediction_type=prediction)
    scheduler.set_timesteps(10)
    t, (x, output) = scheduler.timesteps[3], torch.randn(2, 1, 20000, generator=torch.Generator().manual_seed(0))

    def spread(sigma: float, lower: bool, noise: float = 1.0) -> float:
        schedule, once = copy.deepcopy(scheduler), torch.ones(1, dtype=torch.float64)
        if lower:
            correction = Correction(once * t, 0 * once, 0 * once[None], once * half**2)
            Corrected(nn.Identity(), correction, TimeAxis("t")).lower_noise(schedule)
        wrong, added = (torch.randn(x.shape, generator=torch.Generator().manual_seed(i)) for i in (1, 2))
        exact = scheduler.step(output, t, x, eta=1.0, variance_noise=0 * x).prev_sample
        found = schedule.step(output + sigma * wrong, t, x, eta=1.0, variance_noise=noise * added).prev_sample
        return (found - exact).std().item()

    plain = spread(0.0, False)
    half = 0.5 * plain / spread(1.0, False, 0.0)  # adds a quarter to the variance
    assert spread(half, False) == pytest.approx(plain * 1.25**0.5, rel=0.02)
    assert spread(0.0, True) == pytest.approx(plain * 0.75**0.5, rel=0.02)
    assert spread(half, True) == pytest.approx(plain, rel=0.02)


def test_without_eta_and_in_other_schedules_nothing_changes() -> None:
    corrected = Corrected(nn.Identity(), halved(), TimeAxis("t"))
    x = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    for scheduler in (DDIMScheduler(), DDPMScheduler()):
        scheduler.set_timesteps(10)
        expected, found = (
            schedule.step(x, 400, x, generator=torch.Generator().manual_seed(1)).prev_sample
            for schedule in (copy.deepcopy(scheduler), scheduler)
            if schedule is not scheduler or corrected.lower_noise(schedule) is None
        )
        assert torch.equal(found, expected)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_the_coefficient_is_how_diffusers_ddim_reacts_to_the_prediction(eta: float) -> None:
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(10)
    t = scheduler.timesteps[3]
    x, eps = torch.randn(2, 1, 3, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def step(prediction: Tensor) -> Tensor:
        zero = torch.zeros_like(x)
        stepped: Tensor = scheduler.step(prediction, t, x, eta=eta, variance_noise=zero if eta else None).prev_sample
        return stepped

    alpha, before = (scheduler.alphas_cumprod[i].double() for i in (t, t - 100))
    sampler = eta**2 * (1 - before) / (1 - alpha) * (1 - alpha / before)
    moved = (step(eps + 1e-3) - step(eps)) / 1e-3
    torch.testing.assert_close(moved, ddim_coefficient(alpha, before, sampler).expand_as(moved), rtol=1e-5, atol=1e-7)
