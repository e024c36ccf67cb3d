"""A class-conditional model of two blocks, quantized without learning, and its full-precision trajectories."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel

from ptq_tdq.calib_data import LoadedModel, collect, unet_sha256
from ptq_tdq.calibrate import calibrate
from ptq_tdq.config import Config
from ptq_tdq.evaluate.trajectories import Reference, make_reference
from ptq_tdq.quantized_model import QuantizedModel

QUICK = {"rounding": "nearest", "activation_iterations": 0, "method": "step-table", "samples_per_step": 2}
STEPS = {"calibration_steps": 3, "num_inference_steps": 3}


@pytest.fixture(scope="session")
def model() -> LoadedModel:
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        add_attention=False,
        num_class_embeds=3,
    )
    unet.eval().requires_grad_(False)
    return LoadedModel(unet, DDIMScheduler(), None, "tiny", unet_sha256(unet), num_classes=3)


@pytest.fixture(scope="session")
def quantized(model: LoadedModel) -> QuantizedModel:
    """The model at W4A4, x_t quantized too; tests leave it as it is."""
    config = Config().changed({**QUICK, **STEPS, "scheme": "W4A4", "weight_only_layers": "time_embedding"})
    return calibrate(model.unet, config, collect(model, samples_per_step=2, **STEPS))


@pytest.fixture(scope="session")
def reference(model: LoadedModel) -> Reference:
    return make_reference(model, samples=4, num_inference_steps=3, seed=0)
