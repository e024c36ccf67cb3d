"""FD-C10 and class accuracy of test images, of their reconstructions and of samples.

FD-C10 is the Frechet distance in the 256 features of the embedded CIFAR-10 classifier, to the 50,000 training images.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DModel

from ptq_tdq.calib_data.reference import Cifar10Classifier, reference_statistics
from ptq_tdq.evaluate.frechet import feature_statistics, frechet_distance
from reference_model.data import to_unit


@torch.no_grad()
def scores(classifier: Cifar10Classifier, images: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """FD-C10 and accuracy (percent) of float images [N, 3, 32, 32] in [-1, 1] with labels [N]."""
    features = torch.cat([classifier.features(part) for part in images.split(500)])
    correct = (classifier.head(features).argmax(1) == labels).double().mean()
    distance = frechet_distance(*feature_statistics(features.numpy()), *reference_statistics())
    return {"images": len(images), "fd_c10": round(distance, 4), "accuracy": round(100 * float(correct), 2)}


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """Decode the modes [N, 3, H, W] in [-1, 1] of float images of the same shape."""
    parts = [vae.decode(vae.encode(part).latent_dist.mode()).sample for part in images.split(250)]
    return torch.cat(parts).clamp(-1, 1)


@torch.no_grad()
def sample(
    unet: UNet2DModel,
    vae: AutoencoderKL,
    scheduler: DDIMScheduler,
    *,
    count: int,
    steps: int,
    seed: int,
    batch: int = 125,
    bf16: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """DDIM samples (eta 0, no guidance) [count, 3, 32, 32] in [-1, 1] and their classes 0, 1, ... 9, 0, 1, ..."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(count, 4, 16, 16, generator=generator)
    labels = torch.arange(count) % 10
    scheduler.set_timesteps(steps)
    images = []
    for x, classes in zip(start.split(batch), labels.split(batch), strict=True):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            for t in scheduler.timesteps:
                noise = unet(x, t, class_labels=classes).sample.float()
                x = scheduler.step(noise, t, x).prev_sample
        images.append(vae.decode(x / vae.config.scaling_factor).sample.clamp(-1, 1))
    return torch.cat(images), labels


def evaluate(
    unet: UNet2DModel | None,
    vae: AutoencoderKL,
    scheduler: DDIMScheduler,
    classifier: Cifar10Classifier,
    images: torch.Tensor,
    labels: torch.Tensor,
    report: Callable[[dict[str, Any]], None],
    *,
    reconstructions: int,
    count: int,
    steps: int,
    seed: int,
    bf16: bool,
) -> None:
    """Hand to ``report`` one record each of the test images, a random part of them, its reconstructions and samples."""
    if reconstructions:
        report({"what": "test images", **scores(classifier, to_unit(images), labels)})
        chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:reconstructions]
        part, names = to_unit(images[chosen]), labels[chosen]
        report({"what": "random test images", **scores(classifier, part, names)})
        decoded = reconstruct(vae, part)
        psnr = -10 * torch.log10((decoded - part).square().mean((1, 2, 3)) / 4).mean()
        report({"what": "reconstructions", **scores(classifier, decoded, names), "psnr": round(float(psnr), 2)})
    if unet is not None:
        drawn, classes = sample(unet, vae, scheduler, count=count, steps=steps, seed=seed, bf16=bf16)
        report({"what": "samples", "steps": steps, "seed": seed, "bf16": bf16, **scores(classifier, drawn, classes)})
