"""Comparison of a U-Net with its full-precision reference: identities that hold for any sampler."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from torch import Tensor, nn

from ptq_tdq.calib_data import LoadedModel, collect, unet_sha256
from ptq_tdq.evaluate.trajectories import Comparison, compare, make_noise, make_reference


def load(make: Callable[..., UNet2DModel], scheduler: Any, classes: int | None = None) -> LoadedModel:
    unet = make(num_class_embeds=classes, block_out_channels=(8,), down_block_types=("DownBlock2D",),
                up_block_types=("UpBlock2D",), add_attention=False)  # fmt: skip
    return LoadedModel(unet, scheduler, None, "tiny", unet_sha256(unet), num_classes=classes or 0)


class Scaled(nn.Module):
    """A model whose prediction is off by a known ratio."""

    def __init__(self, unet: nn.Module, ratio: float) -> None:
        super().__init__()
        self.unet, self.ratio, self.config = unet, ratio, unet.config

    def forward(self, sample: Tensor, timestep: Tensor, **kwargs: Any) -> tuple[Tensor]:
        return (self.unet(sample, timestep, **{**kwargs, "return_dict": False})[0] * self.ratio,)


@pytest.mark.parametrize(("scheduler", "classes"), [(DDIMScheduler(), None), (DDPMScheduler(), 3)])
def test_the_model_itself_differs_in_nothing(
    tiny_unet: Callable[..., UNet2DModel], scheduler: Any, classes: Any
) -> None:
    model = load(tiny_unet, scheduler, classes)
    reference = make_reference(model, samples=4, num_inference_steps=3, seed=5)
    found = compare(reference, model.unet, seed=5)
    scheduler.set_timesteps(3)
    assert found.t == tuple(scheduler.timesteps.tolist())
    assert set(found.noise_sqnr_db) == {math.inf} and found.latent_sqnr_db == math.inf
    assert found.to_dict()["noise_sqnr_db"] == {str(t): None for t in scheduler.timesteps.tolist()}


def test_a_known_relative_error_has_its_known_ratio_at_each_step(tiny_unet: Callable[..., UNet2DModel]) -> None:
    model = load(tiny_unet, DDIMScheduler())
    reference = make_reference(model, samples=2, num_inference_steps=4, seed=0)
    found = compare(reference, Scaled(model.unet, 1.01), seed=0)
    assert found.noise_sqnr_db == pytest.approx([40.0] * 4, abs=0.01)
    assert found.mean_noise_sqnr_db == pytest.approx(40.0, abs=0.01)
    assert math.isfinite(found.latent_sqnr_db)


def test_noise_follows_from_the_seed_and_labels_cycle(tiny_unet: Callable[..., UNet2DModel]) -> None:
    model = load(tiny_unet, DDIMScheduler(), 3)
    noise, labels = make_noise(model, 5, seed=1)
    assert noise.shape == (5, 3, 8, 8) and labels is not None and labels.tolist() == [0, 1, 2, 0, 1]
    assert torch.equal(noise, make_noise(model, 5, seed=1)[0])
    assert not torch.equal(noise, make_noise(model, 5, seed=2)[0])


def test_evaluation_does_not_start_from_the_noise_of_calibration(tiny_unet: Callable[..., UNet2DModel]) -> None:
    model = load(tiny_unet, DDIMScheduler())
    calibration_set = collect(model, samples_per_step=4, calibration_steps=2, num_inference_steps=2, seed=1)
    first = calibration_set.x[calibration_set.t == calibration_set.t.max()].flatten(1)
    noise = make_noise(model, 4, seed=1)[0].flatten(1)
    assert len(first) == 4 and torch.cdist(noise, first).min() > 1


def test_a_comparison_is_json_ready() -> None:
    found = Comparison((999.0, 0.5), (20.0, 30.0), math.inf).to_dict()
    assert found == {
        "latent_sqnr_db": None,
        "mean_noise_sqnr_db": 25.0,
        "noise_sqnr_db": {"999": 20.0, "0.5": 30.0},
    }
