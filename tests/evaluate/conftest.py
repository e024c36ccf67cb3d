"""Small denoisers with their samplers, and denoisers whose error is known."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel
from torch import nn
from torch.utils import _pytree as pytree

from ptq_tdq.calib_data import LoadedModel, LoopSampler
from ptq_tdq.identity import model_sha256


@pytest.fixture
def tiny(tiny_unet: Callable[..., UNet2DModel]) -> Callable[..., LoadedModel]:
    """Build a model of one small block whose sampler runs ``batch`` samples at once."""

    def make(scheduler: Any = None, classes: int | None = None, batch: int = 64, channels: int = 3) -> LoadedModel:
        unet = tiny_unet(num_class_embeds=classes, block_out_channels=(8,), down_block_types=("DownBlock2D",),
                         up_block_types=("UpBlock2D",), add_attention=False, in_channels=channels,
                         out_channels=channels)  # fmt: skip
        sampler = LoopSampler(unet, scheduler or DDIMScheduler())
        sampler.batch = batch
        return LoadedModel(unet, "tiny", model_sha256(unet), sampler=sampler)

    return make


@pytest.fixture(scope="session")
def scaled() -> Callable[[nn.Module, float], nn.Module]:
    """Copy a denoiser so that its prediction is off by a known ratio."""

    def make(denoiser: nn.Module, ratio: float) -> nn.Module:
        def scale(module: nn.Module, args: Any, output: Any) -> Any:
            return pytree.tree_map(lambda x: x * ratio if isinstance(x, torch.Tensor) else x, output)

        copied = copy.deepcopy(denoiser)
        copied.register_forward_hook(scale)
        return copied

    return make
