"""Small real diffusers models, and the dummy model of diffusers' own scheduler tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from pipelines import PIPELINES, SmallPipeline
from torch import Tensor

from ptq_tdq.calib_data import LoadedModel, LoopSampler
from ptq_tdq.identity import model_sha256


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


def loaded(unet: UNet2DModel, scheduler: Any) -> LoadedModel:
    return LoadedModel(unet, "tiny", model_sha256(unet), sampler=LoopSampler(unet, scheduler))


@pytest.fixture
def unet() -> UNet2DModel:
    return make_unet()


@pytest.fixture
def model() -> LoadedModel:
    """Return a class-conditional model with three classes and a deterministic sampler."""
    return loaded(make_unet(num_class_embeds=3), DDIMScheduler())


@pytest.fixture
def stochastic_model(unet: UNet2DModel) -> LoadedModel:
    """Return an unconditional model whose sampler adds noise at every step."""
    return loaded(unet, DDPMScheduler())


@pytest.fixture(scope="session")
def saved_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[SmallPipeline, Path]]:
    """The folder of a small pipeline by its class name, each saved once; tests must not change it."""
    made: dict[str, tuple[SmallPipeline, Path]] = {}

    def folder_of(name: str) -> tuple[SmallPipeline, Path]:
        if name not in made:
            entry = next(entry for entry in PIPELINES if entry.name == name)
            folder = tmp_path_factory.mktemp(name)
            entry.save(folder)
            made[name] = entry, folder
        return made[name]

    return folder_of
