"""The transformer: flow matching on the same latents (rectified flow, logit-normal times)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from torch import nn

from reference_model.data import draw_images
from reference_model.loop import fast_autocast

CONFIG: dict[str, Any] = {
    "num_attention_heads": 3,
    "attention_head_dim": 64,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 8,
    "sample_size": 16,
    "patch_size": 2,
    "num_embeds_ada_norm": 10,  # its own dropout in training mode replaces a class by 10, "no class"
    "norm_elementwise_affine": False,
}
SCHEDULER: dict[str, Any] = {"num_train_timesteps": 1000, "shift": 1.0}


def new_dit() -> DiTTransformer2DModel:
    """A transformer whose blocks begin as identities (adaLN-zero) and whose output begins at zero."""
    model = DiTTransformer2DModel(**CONFIG)
    zeros = [block.norm1.linear for block in model.transformer_blocks] + [model.proj_out_1, model.proj_out_2]
    for linear in zeros:
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    return model


def flow_batch(
    latents: torch.Tensor, labels: torch.Tensor, batch: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Noisy latents (1 - sigma) image + sigma noise, sigma [B] = sigmoid of a normal, classes [B], the velocity."""
    clean, classes = draw_images(latents, labels, batch, generator)
    noise = torch.randn(clean.shape, generator=generator, device=clean.device)
    sigma = torch.sigmoid(torch.randn(batch, generator=generator, device=clean.device))
    s = sigma.view(-1, 1, 1, 1)
    return (1 - s) * clean + s * noise, sigma, classes, noise - clean


def dit_loss(
    latents: torch.Tensor, labels: torch.Tensor, batch: int
) -> Callable[[DiTTransformer2DModel, torch.Generator], torch.Tensor]:
    """Mean squared error of the velocity on a batch of latents [2, N, 4, h, w]; bf16 where that is fast."""

    def loss(model: DiTTransformer2DModel, generator: torch.Generator) -> torch.Tensor:
        x, sigma, classes, velocity = flow_batch(latents, labels, batch, generator)
        with fast_autocast(x.device):
            predicted = model(x, timestep=sigma * 1000, class_labels=classes).sample
        return torch.nn.functional.mse_loss(predicted.float(), velocity)

    return loss
