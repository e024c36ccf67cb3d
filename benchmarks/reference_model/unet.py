"""The U-Net: epsilon prediction on cached latents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DModel
from torch.nn.attention import SDPBackend, sdpa_kernel

from reference_model.data import draw_images
from reference_model.loop import fast_autocast

NO_CLASS = 10
CONFIG: dict[str, Any] = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (64, 128, 128),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 64,
    "norm_num_groups": 32,
    "num_class_embeds": NO_CLASS + 1,
}
SCHEDULER: dict[str, Any] = {
    "beta_start": 0.0015,
    "beta_end": 0.0195,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "timestep_spacing": "leading",
}


def noise_batch(
    latents: torch.Tensor, labels: torch.Tensor, alphas: torch.Tensor, batch: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Noisy latents [B, 4, h, w], time steps [B] (one per stratum of 0..T-1), classes [B] (10% dropped), noise."""
    clean, classes = draw_images(latents, labels, batch, generator)
    device = clean.device
    noise = torch.randn(clean.shape, generator=generator, device=device)
    spread = (torch.arange(batch, device=device) + torch.rand(batch, generator=generator, device=device)) / batch
    t = (spread * len(alphas)).long().clamp(max=len(alphas) - 1)
    dropped = torch.rand(batch, generator=generator, device=device) < 0.1
    a = alphas[t].view(-1, 1, 1, 1)
    return a.sqrt() * clean + (1 - a).sqrt() * noise, t, classes.masked_fill(dropped, NO_CLASS), noise


def unet_loss(
    latents: torch.Tensor, labels: torch.Tensor, scheduler: DDIMScheduler, batch: int
) -> Callable[[UNet2DModel, torch.Generator], torch.Tensor]:
    """Mean squared error of the predicted noise on a batch of latents [2, N, 4, h, w]; bf16 where that is fast."""
    alphas = scheduler.alphas_cumprod.to(latents.device)

    def loss(unet: UNet2DModel, generator: torch.Generator) -> torch.Tensor:
        x, t, classes, noise = noise_batch(latents, labels, alphas, batch, generator)
        with sdpa_kernel(SDPBackend.MATH), fast_autocast(x.device):
            predicted = unet(x, t, class_labels=classes).sample
        return torch.nn.functional.mse_loss(predicted.float(), noise)

    return loss
