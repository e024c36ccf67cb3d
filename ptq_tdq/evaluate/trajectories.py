"""A quantized U-Net against the full-precision one, from the same noise: at each step, and at the end of the way."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ptq_tdq.calib_data import LoadedModel, Recorder, sample_latents
from ptq_tdq.evaluate.metrics import sqnr_db

# Trajectories for evaluation must not be those of a calibration set with the same seed.
SEED_OFFSET = 1 << 31  # torch's CPU generator uses the low 32 bits of a seed


@dataclass(frozen=True, eq=False)
class Reference:
    """Full-precision trajectories: ``noise`` and final ``latents`` [N, C, H, W], and each call of the U-Net in between.

    ``x`` and ``prediction`` have one tensor [N, C, H, W] per step, ``t`` one tensor [N].
    """

    model: LoadedModel
    num_inference_steps: int
    noise: Tensor
    class_labels: Tensor | None
    x: tuple[Tensor, ...]
    t: tuple[Tensor, ...]
    prediction: tuple[Tensor, ...]
    latents: Tensor

    def labels(self) -> dict[str, Tensor]:
        """The class argument of a U-Net call, if the model has classes."""
        return {} if self.class_labels is None else {"class_labels": self.class_labels}


@dataclass(frozen=True)
class Comparison:
    """SQNR in dB of the predicted noise at each step (on the full-precision trajectory) and of the final latents."""

    t: tuple[float, ...]
    noise_sqnr_db: tuple[float, ...]
    latent_sqnr_db: float

    @property
    def mean_noise_sqnr_db(self) -> float:
        return sum(self.noise_sqnr_db) / len(self.noise_sqnr_db)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; None stands for an infinite ratio (no difference at all)."""
        steps = {f"{t:g}": _finite(value) for t, value in zip(self.t, self.noise_sqnr_db, strict=True)}
        return {
            "latent_sqnr_db": _finite(self.latent_sqnr_db),
            "mean_noise_sqnr_db": _finite(self.mean_noise_sqnr_db),
            "noise_sqnr_db": steps,
        }


def make_noise(model: LoadedModel, samples: int, seed: int) -> tuple[Tensor, Tensor | None]:
    """Initial noise [N, C, H, W] and class labels (cycling through the classes; None without classes)."""
    config = model.unet.config
    size = config.sample_size if isinstance(config.sample_size, list | tuple) else [config.sample_size] * 2
    generator = torch.Generator().manual_seed(SEED_OFFSET + seed)
    labels = torch.arange(samples) % model.num_classes if model.num_classes else None
    return torch.randn(samples, config.in_channels, *size, generator=generator), labels


def make_reference(model: LoadedModel, *, samples: int, num_inference_steps: int, seed: int) -> Reference:
    """Sample ``samples`` full-precision trajectories with the model's own scheduler."""
    noise, labels = make_noise(model, samples, seed)
    recorder = Recorder(model.unet)
    predictions: list[Tensor] = []
    handle = model.unet.register_forward_hook(lambda unet, args, output: predictions.append(output[0]))
    try:
        latents = run(recorder, model, noise, labels, num_inference_steps, seed)
    finally:
        handle.remove()
    records = recorder.records
    return Reference(
        model, num_inference_steps, noise, labels,
        tuple(r.x for r in records), tuple(r.t for r in records), tuple(predictions), latents,
    )  # fmt: skip


def run(
    unet: nn.Module, model: LoadedModel, noise: Tensor, labels: Tensor | None, num_inference_steps: int, seed: int
) -> Tensor:
    """Final latents of ``unet`` with the scheduler of ``model``; a sampler's own noise follows from ``seed``."""
    generator = torch.Generator().manual_seed(SEED_OFFSET + seed + 1)
    return sample_latents(
        unet,
        model.scheduler,
        noise=noise,
        num_inference_steps=num_inference_steps,
        class_labels=labels,
        generator=generator,
    )


def compare(reference: Reference, unet: nn.Module, seed: int) -> Comparison:
    """Measure ``unet`` against the reference; ``seed`` is that of the reference."""
    errors = []
    with torch.no_grad():
        for x, t, expected in zip(reference.x, reference.t, reference.prediction, strict=True):
            errors.append(sqnr_db(expected, unet(x, t, return_dict=False, **reference.labels())[0]))
    latents = run(unet, reference.model, reference.noise, reference.class_labels, reference.num_inference_steps, seed)
    times = tuple(t[0].item() for t in reference.t)
    return Comparison(times, tuple(errors), sqnr_db(reference.latents, latents))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
