"""The autoencoder: trained from scratch, or only its decoder trained on while the encoder (so every latent) stays."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch.nn.functional import l1_loss, mse_loss

from ptq_tdq.calib_data.reference import Cifar10Classifier
from reference_model.data import save_atomic, to_unit

CONFIG: dict[str, Any] = {
    "sample_size": 32,
    "latent_channels": 4,
    "block_out_channels": (32, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 1,
    "norm_num_groups": 16,
    "mid_block_add_attention": False,
}
WARMUP = 50


def train_vae(vae: AutoencoderKL, images: torch.Tensor, *, steps: int, batch: int, peak: float, seed: int) -> None:
    """Train encoder and decoder on uint8 images [N, 3, H, W]: L1 + L2 + 1e-5 KL; then set ``scaling_factor``."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=peak)
    vae.train()
    for step in range(steps):
        _set_rate(optimizer, step, steps, peak)
        x = to_unit(_flipped(images, batch, generator)[0])
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.sample(generator)).sample.float()
        loss = l1_loss(y, x) + mse_loss(y, x) + 1e-5 * posterior.kl().float().mean()
        _update(optimizer, loss)
        _report("vae", step, steps, loss)
    vae.eval()
    with torch.no_grad():
        spread = torch.cat([vae.encode(to_unit(part)).latent_dist.mode() for part in images[:5000].split(250)]).std()
    vae.register_to_config(scaling_factor=1 / float(spread))


def train_decoder(
    vae: AutoencoderKL,
    images: torch.Tensor,
    latents: torch.Tensor,
    classifier: Cifar10Classifier,
    work: Path,
    *,
    steps: int,
    batch: int,
    peak: float,
    feature_weight: float,
    seed: int,
    checkpoint_every: int,
) -> None:
    """Train ``post_quant_conv`` and ``decoder`` on pairs of cached latents [2, N, 4, h, w] and images [N, 3, H, W].

    The loss is L1 + L2 + ``feature_weight`` x the relative squared error of the classifier's three feature maps.
    A checkpoint in ``work`` is resumed.
    """
    vae.requires_grad_(False).train()
    parameters = [p.requires_grad_() for part in (vae.post_quant_conv, vae.decoder) for p in part.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=peak, betas=(0.9, 0.99))
    generator = torch.Generator().manual_seed(seed)
    first, path = 0, work / "decoder.ckpt"
    if path.exists():
        state = torch.load(path, weights_only=True)
        vae.load_state_dict(state["vae"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
        first = state["step"]
    for step in range(first, steps):
        _set_rate(optimizer, step, steps, peak)
        x, index, flip = _flipped(images, batch, generator)
        x, z = to_unit(x), latents[flip, index].float() / vae.config.scaling_factor
        with torch.autocast("cpu", torch.bfloat16):
            y = vae.decode(z).sample
            with torch.no_grad():
                wanted = classifier.feature_maps(x)
            maps = classifier.feature_maps(y) if feature_weight else wanted
        features = sum(_relative(a.float(), b.float()) for a, b in zip(maps, wanted, strict=True))
        loss = l1_loss(y.float(), x) + mse_loss(y.float(), x) + feature_weight * features
        _update(optimizer, loss)
        _report("decoder", step, steps, loss)
        if (step + 1) % checkpoint_every == 0:
            values = {"vae": vae.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            save_atomic({**values, "generator": generator.get_state()}, path)
    vae.eval()


def _flipped(images: torch.Tensor, batch: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    """Random images [B, ...], each mirrored with probability 1/2; their indices [B]; 1 where mirrored [B]."""
    index = torch.randint(len(images), (batch,), generator=generator)
    flip = torch.randint(2, (batch,), generator=generator)
    x = images[index]
    return torch.where(flip.view(-1, 1, 1, 1).bool(), x.flip(3), x), index, flip


def _relative(value: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    return mse_loss(value, wanted) / wanted.square().mean()


def _set_rate(optimizer: torch.optim.Optimizer, step: int, steps: int, peak: float) -> None:
    rate = peak * min((step + 1) / WARMUP, (1 + math.cos(math.pi * step / steps)) / 2)
    for group in optimizer.param_groups:
        group["lr"] = rate


def _update(optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()


def _report(stage: str, step: int, steps: int, loss: torch.Tensor) -> None:
    if (step + 1) % 50 == 0:
        print(f"{stage} {step + 1}/{steps} loss {loss.item():.4f}", flush=True)
