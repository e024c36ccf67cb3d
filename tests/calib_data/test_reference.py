"""The embedded reference model: everything loads, has the published shapes and agrees with itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DModel
from safetensors.torch import load_file

from ptq_tdq.calib_data.reference import (
    NO_CLASS,
    Cifar10Classifier,
    load_classifier,
    reference_path,
    reference_statistics,
)
from ptq_tdq.evaluate.frechet import frechet_distance


def test_the_unet_predicts_noise_of_the_latent_shape() -> None:
    unet = UNet2DModel.from_pretrained(reference_path(), subfolder="unet", torch_dtype=torch.float32).eval()
    assert unet.dtype == torch.float32
    assert unet.config.num_class_embeds == NO_CLASS + 1
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        noise = unet(latents, torch.tensor([999, 999]), class_labels=torch.tensor([3, NO_CLASS])).sample
    assert noise.shape == latents.shape
    assert torch.corrcoef(torch.stack([noise.flatten(), latents.flatten()]))[0, 1] > 0.95, "at t = 999 all is noise"


def test_the_vae_decodes_latents_of_half_the_size() -> None:
    vae = AutoencoderKL.from_pretrained(reference_path(), subfolder="vae", torch_dtype=torch.float32).eval()
    ramp = torch.linspace(-1, 1, 32).expand(1, 3, 32, 32)
    with torch.no_grad():
        latents = vae.encode(ramp).latent_dist.mode()
        decoded = vae.decode(latents).sample
    assert latents.shape == (1, 4, 16, 16)
    assert (decoded - ramp).abs().mean() < 0.1


def test_the_scheduler_is_the_one_of_the_training() -> None:
    scheduler = DDIMScheduler.from_pretrained(reference_path(), subfolder="scheduler")
    assert scheduler.config.num_train_timesteps == 1000
    assert scheduler.config.prediction_type == "epsilon"
    assert float(scheduler.betas[0]) == pytest.approx(0.0015)
    assert float(scheduler.betas[-1]) == pytest.approx(0.0195)


def test_the_classifier_averages_its_last_maps_over_space() -> None:
    classifier = load_classifier()
    assert isinstance(classifier, Cifar10Classifier) and not classifier.training
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    features = classifier.features(images)
    assert features.shape == (3, 256)
    assert classifier(images).shape == (3, 10)
    torch.testing.assert_close(classifier.head(features), classifier(images))
    shapes = [tuple(part.shape[1:]) for part in classifier.feature_maps(images)]
    assert shapes == [(64, 16, 16), (128, 8, 8), (256, 4, 4)]


def test_the_statistics_are_a_mean_and_a_covariance() -> None:
    mean, cov = reference_statistics()
    assert mean.shape == (256,) and cov.shape == (256, 256)
    assert mean.dtype == cov.dtype == np.float64
    np.testing.assert_allclose(cov, cov.T, rtol=0, atol=1e-6)
    assert np.linalg.eigvalsh(cov).min() > -1e-5
    assert frechet_distance(mean, cov, mean, cov) < 1e-8


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_the_stored_weights_are_finite_halves(part: str) -> None:
    stored = load_file(reference_path() / part / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float16}
    assert all(bool(value.isfinite().all()) for value in stored.values())
