"""The U-Net: epsilon prediction on cached latents, resumable, its schedule counted in steps and never in seconds."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DModel
from torch.nn.attention import SDPBackend, sdpa_kernel

from reference_model.data import save_atomic

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


def learning_rate(step: int, peak: float, warmup: int, anchor: tuple[int, float], last: int) -> float:
    """Linear warm-up to ``peak``, then a straight line from ``anchor`` (step, rate) down to 0 at step ``last``."""
    decayed = anchor[1] * (last - step) / max(1, last - anchor[0]) if step >= anchor[0] else peak
    return min(peak * (step + 1) / max(1, warmup), decayed)


def noise_batch(
    latents: torch.Tensor, labels: torch.Tensor, alphas: torch.Tensor, batch: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Noisy latents [B, 4, h, w], time steps [B] (one per stratum of 0..T-1), classes [B] (10% dropped), noise."""
    index = torch.randint(latents.shape[1], (batch,), generator=generator)
    flip = torch.randint(2, (batch,), generator=generator)
    clean = latents[flip, index].float()
    noise = torch.randn(clean.shape, generator=generator)
    spread = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
    t = (spread * len(alphas)).long().clamp(max=len(alphas) - 1)
    dropped = torch.rand(batch, generator=generator) < 0.1
    a = alphas[t].view(-1, 1, 1, 1)
    return a.sqrt() * clean + (1 - a).sqrt() * noise, t, labels[index].masked_fill(dropped, NO_CLASS), noise


def train_unet(
    unet: UNet2DModel,
    scheduler: DDIMScheduler,
    latents: torch.Tensor,
    labels: torch.Tensor,
    work: Path,
    *,
    steps: int,
    batch: int,
    peak: float,
    warmup: int,
    decay_start: int,
    ema_decay: float,
    seed: int,
    checkpoint_every: int,
) -> UNet2DModel:
    """Train to step ``steps`` and return the model with its averaged (EMA) weights.

    A checkpoint in ``work`` is resumed; when ``steps`` has changed since, the rate falls in a straight line from where
    it is now to 0 at the new end. SIGTERM writes a checkpoint and exits with 143.
    """
    optimizer = torch.optim.AdamW(unet.parameters(), lr=peak, betas=(0.9, 0.99), weight_decay=0.01)
    parameters = list(unet.parameters())
    average = [p.detach().clone() for p in parameters]
    generator = torch.Generator().manual_seed(seed)
    alphas = scheduler.alphas_cumprod
    anchor, step, path = (decay_start, peak), 0, work / "unet.ckpt"
    if path.exists():
        state = torch.load(path, weights_only=True)
        unet.load_state_dict(state["unet"])
        optimizer.load_state_dict(state["optimizer"])
        average, step, anchor = state["average"], state["step"], tuple(state["anchor"])
        generator.set_state(state["generator"])
        if state["last"] != steps and step > anchor[0]:
            anchor = (step, learning_rate(step, peak, warmup, anchor, state["last"]))

    def checkpoint() -> None:
        values = {"unet": unet.state_dict(), "optimizer": optimizer.state_dict(), "average": average, "step": step}
        save_atomic({**values, "anchor": anchor, "last": steps, "generator": generator.get_state()}, path)

    stopping: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: stopping.append(number))
    running, started = 0.0, time.process_time()
    unet.train()
    while step < steps:
        rate = learning_rate(step, peak, warmup, anchor, steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        x, t, classes, noise = noise_batch(latents, labels, alphas, batch, generator)
        with sdpa_kernel(SDPBackend.MATH), torch.autocast("cpu", torch.bfloat16):
            predicted = unet(x, t, class_labels=classes).sample
        loss = torch.nn.functional.mse_loss(predicted.float(), noise)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - ema_decay)
        step += 1
        running += loss.item()
        if step % 50 == 0:
            seconds = (time.process_time() - started) / 50
            print(f"unet {step}/{steps} loss {running / 50:.4f} lr {rate:.2e} cpu {seconds:.2f} s/step", flush=True)
            running, started = 0.0, time.process_time()
        if step % checkpoint_every == 0 or step == steps or stopping:
            checkpoint()
        if stopping:
            raise SystemExit(143)
    with torch.no_grad():
        torch._foreach_copy_(parameters, average)
    return unet.eval()
