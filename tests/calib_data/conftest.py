"""Small real diffusers models, and the dummy model of diffusers' own scheduler tests."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from torch import Tensor, nn

from ptq_tdq.calib_data import LoadedModel, unet_sha256


class DummyUNet(nn.Module):
    """``sample * t / (t + 1)``, the dummy model of diffusers' tests/schedulers/test_schedulers.py."""

    def forward(
        self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None, return_dict: bool = True
    ) -> tuple[Tensor]:
        return (sample * timestep / (timestep + 1),)


@pytest.fixture
def dummy() -> DummyUNet:
    return DummyUNet()


@pytest.fixture
def dummy_sample() -> Tensor:
    """Return ``dummy_sample_deter`` of diffusers' tests/schedulers/test_schedulers.py."""
    count = 4 * 3 * 8 * 8
    return (torch.arange(count).reshape(3, 8, 8, 4) / count).permute(3, 0, 1, 2)


def make_unet(num_class_embeds: int | None = None) -> UNet2DModel:
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(32, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        num_class_embeds=num_class_embeds,
    )
    return unet.eval().requires_grad_(False)


@pytest.fixture
def unet() -> UNet2DModel:
    return make_unet()


@pytest.fixture
def model() -> LoadedModel:
    """Return a class-conditional model with three classes and a deterministic sampler."""
    unet = make_unet(num_class_embeds=3)
    return LoadedModel(unet, DDIMScheduler(), None, "tiny", unet_sha256(unet), num_classes=3)


@pytest.fixture
def stochastic_model(unet: UNet2DModel) -> LoadedModel:
    """Return an unconditional model whose sampler adds noise at every step."""
    return LoadedModel(unet, DDPMScheduler(), None, "tiny", unet_sha256(unet))
