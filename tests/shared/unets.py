"""A U-Net of diffusers that is as small as one with everything can be."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DModel


def tiny_unet(**changes: Any) -> UNet2DModel:
    """8 and 16 channels with random weights, attention and skips of different widths."""
    torch.manual_seed(0)
    options = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "norm_num_groups": 4,
    }
    return UNet2DModel(**(options | changes)).eval().requires_grad_(False)
