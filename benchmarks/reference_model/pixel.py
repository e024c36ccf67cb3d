"""The pixel-space model: an unconditional U-Net on the images themselves, in the proportions of DDPM's for CIFAR-10."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DModel

from reference_model.loop import fast_autocast
from reference_model.unet import noise_batch

CONFIG: dict[str, Any] = {  # DDPM's has 128-256-256-256 and two blocks a level
    "sample_size": 32,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (64, 128, 128, 128),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": None,
    "dropout": 0.1,
    "norm_eps": 1e-6,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
}
SCHEDULER: dict[str, Any] = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", "clip_sample": True}


def pixel_loss(
    images: torch.Tensor, labels: torch.Tensor, scheduler: DDIMScheduler, batch: int
) -> Callable[[UNet2DModel, torch.Generator], torch.Tensor]:
    """Mean squared error of the predicted noise on a batch of images [2, N, 3, 32, 32] in [-1, 1]."""
    alphas = scheduler.alphas_cumprod.to(images.device)

    def loss(unet: UNet2DModel, generator: torch.Generator) -> torch.Tensor:
        x, t, _, noise = noise_batch(images, labels, alphas, batch, generator)
        with fast_autocast(x.device):
            predicted = unet(x.contiguous(memory_format=torch.channels_last), t).sample
        return torch.nn.functional.mse_loss(predicted.float(), noise)

    return loss
