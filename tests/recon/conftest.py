"""A quantized U-Net with calls at three time steps, small enough for whole runs of the engine."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from diffusers import UNet2DModel

from ptq_tdq import Calls, QuantizedModel, record
from ptq_tdq.config import Config, preset
from ptq_tdq.plan import make_plan


@pytest.fixture(scope="session")
def make_unet(tiny_unet: Callable[..., UNet2DModel]) -> Callable[[], UNet2DModel]:
    options = {
        "num_class_embeds": 3,
        "block_out_channels": (8,),
        "down_block_types": ("DownBlock2D",),
        "up_block_types": ("AttnUpBlock2D",),
        "add_attention": False,
    }
    return lambda: tiny_unet(**options)


@pytest.fixture(scope="session")
def make_calls() -> Callable[[UNet2DModel], Calls]:
    """12 rows, t = 999, 500 and 1 in turn."""

    def make(unet: UNet2DModel) -> Calls:
        x = torch.randn(12, 3, 4, 4, generator=torch.Generator().manual_seed(1))
        with record(unet) as recorded, torch.no_grad():
            unet(x, torch.tensor([999.0, 500.0, 1.0]).repeat(4), class_labels=torch.arange(12) % 3)
        return recorded

    return make


@pytest.fixture
def unet(make_unet: Callable[[], UNet2DModel]) -> UNet2DModel:
    return make_unet()


@pytest.fixture
def calls(unet: UNet2DModel, make_calls: Callable[[UNet2DModel], Calls]) -> Calls:
    return make_calls(unet)


@pytest.fixture
def choose() -> Callable[..., Config]:
    """Build a config of few iterations, with everything quantized."""

    def make(**choices: object) -> Config:
        few = {"weight_iterations": 4, "activation_iterations": 4, "batch_size": 6, "compute_dtype": "float32"}
        return preset("qdiff", **{"method": "S_2", "scheme": "W3A4", "weight_lr": 1e-2, **few, **choices})

    return make


@pytest.fixture
def wrap(unet: UNet2DModel, calls: Calls) -> Callable[[Config], QuantizedModel]:
    """Build a quantized copy of the U-Net."""

    def make(config: Config) -> QuantizedModel:
        return QuantizedModel.copy_of(unet, calls.axis, make_plan(unet, config, calls).layers)

    return make
