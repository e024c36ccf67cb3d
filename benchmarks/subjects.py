"""The models that the runtime benchmarks run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DModel

from ptq_tdq import load_model


def make_model(name: str, folder: Path) -> Any:
    """The embedded model, or a U-Net 64-128-128 at 32x32 with heads of 64 channels and random weights."""
    if name == "embedded":
        return load_model()
    torch.manual_seed(0)
    UNet2DModel(
        sample_size=32,
        block_out_channels=(64, 128, 128),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=64,
    ).save_pretrained(folder / name)
    DDIMScheduler().save_pretrained(folder / name)
    return load_model(str(folder / name))
