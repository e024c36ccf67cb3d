"""A quantized U-Net against the full-precision one, from the same noise: at each step, and at the end of the way."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ptq_tdq.calib_data import LoadedModel, Recorder, sample_latents
from ptq_tdq.evaluate.metrics import sqnr_db

# Trajectories for evaluation must not be those of a calibration set with the same seed.
SEED_OFFSET = 1 << 31  # torch's CPU generator uses the low 32 bits of a seed
BATCH = 50  # samples in one call of a U-Net; the CPU gains nothing from more

Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class Reference:
    """Full-precision trajectories: ``noise`` and final ``latents`` [N, C, H, W], and calls of the U-Net in between.

    ``x`` and ``prediction`` have one tensor [R, C, H, W] per step, ``t`` one tensor [R], of the first R samples.
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
        """The class argument of a recorded call of the U-Net, if the model has classes."""
        return {} if self.class_labels is None else {"class_labels": self.class_labels[: len(self.x[0])]}


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
        steps = {f"{t:g}": finite(value) for t, value in zip(self.t, self.noise_sqnr_db, strict=True)}
        return {
            "latent_sqnr_db": finite(self.latent_sqnr_db),
            "mean_noise_sqnr_db": finite(self.mean_noise_sqnr_db),
            "noise_sqnr_db": steps,
        }


def make_noise(model: LoadedModel, samples: int, seed: int) -> tuple[Tensor, Tensor | None]:
    """Initial noise [N, C, H, W] and class labels (cycling through the classes; None without classes)."""
    config = model.unet.config
    size = config.sample_size if isinstance(config.sample_size, list | tuple) else [config.sample_size] * 2
    generator = torch.Generator().manual_seed(SEED_OFFSET + seed)
    labels = torch.arange(samples) % model.num_classes if model.num_classes else None
    return torch.randn(samples, config.in_channels, *size, generator=generator), labels


def make_reference(
    model: LoadedModel,
    *,
    samples: int,
    num_inference_steps: int,
    seed: int,
    recorded: int | None = None,
    on_progress: Progress | None = None,
) -> Reference:
    """Sample ``samples`` full-precision trajectories with the model's own scheduler.

    The calls of the first ``recorded`` ones are kept, of all by default. ``on_progress(done, total)`` counts samples.
    """
    noise, labels = make_noise(model, samples, seed)
    kept = samples if recorded is None else min(recorded, samples)
    calls: list[list[tuple[Tensor, ...]]] = []  # of each recorded batch: x, t and prediction of each step
    latents = []
    for batch in (*_batches(0, kept), *_batches(kept, samples)):
        part = None if labels is None else labels[batch]
        with _watched(model.unet, calls) if batch.start < kept else nullcontext(model.unet) as unet:
            latents.append(_run_batch(unet, model, noise[batch], part, num_inference_steps, seed, batch.start))
        if on_progress is not None:
            on_progress(batch.stop, samples)
    steps = [tuple(torch.cat(each) for each in zip(*step, strict=True)) for step in zip(*calls, strict=True)]
    x, t, prediction = zip(*steps, strict=True)
    return Reference(model, num_inference_steps, noise, labels, x, t, prediction, torch.cat(latents))


def run(
    unet: nn.Module,
    model: LoadedModel,
    noise: Tensor,
    labels: Tensor | None,
    num_inference_steps: int,
    seed: int,
    on_progress: Progress | None = None,
) -> Tensor:
    """Final latents of ``unet`` with the scheduler of ``model``.

    A sampler's own noise follows from ``seed`` and a sample's place. ``on_progress(done, total)`` counts samples.
    """
    latents = []
    for batch in _batches(0, len(noise)):
        part = None if labels is None else labels[batch]
        latents.append(_run_batch(unet, model, noise[batch], part, num_inference_steps, seed, batch.start))
        if on_progress is not None:
            on_progress(batch.stop, len(noise))
    return torch.cat(latents)


def compare(reference: Reference, unet: nn.Module, seed: int, latents: Tensor | None = None) -> Comparison:
    """Measure ``unet`` against the reference, whose seed is ``seed``; ``latents`` are its own if they are known."""
    errors = []
    with torch.no_grad():
        for x, t, expected in zip(reference.x, reference.t, reference.prediction, strict=True):
            calls = (
                unet(x[b], t[b], return_dict=False, **{key: labels[b] for key, labels in reference.labels().items()})[0]
                for b in _batches(0, len(x))
            )
            errors.append(sqnr_db(expected, torch.cat(list(calls))))
    if latents is None:
        noise, labels = reference.noise, reference.class_labels
        latents = run(unet, reference.model, noise, labels, reference.num_inference_steps, seed)
    times = tuple(t[0].item() for t in reference.t)
    return Comparison(times, tuple(errors), sqnr_db(reference.latents, latents))


@contextmanager
def _watched(unet: nn.Module, calls: list[list[tuple[Tensor, ...]]]) -> Iterator[nn.Module]:
    """A U-Net that adds one list to ``calls``: (x, t, prediction) of each of its calls."""
    recorder, predictions = Recorder(unet), list[Tensor]()
    handle = unet.register_forward_hook(lambda module, args, output: predictions.append(output[0]))
    try:
        yield recorder
    finally:
        handle.remove()
    calls.append([(r.x, r.t, prediction) for r, prediction in zip(recorder.records, predictions, strict=True)])


def _batches(start: int, stop: int) -> Iterator[slice]:
    return (slice(i, min(i + BATCH, stop)) for i in range(start, stop, BATCH))


def _run_batch(
    unet: nn.Module, model: LoadedModel, noise: Tensor, labels: Tensor | None, steps: int, seed: int, start: int
) -> Tensor:
    """Final latents of samples ``start``, ``start + 1``, ... of a run."""
    return sample_latents(
        unet,
        model.scheduler,
        noise=noise,
        num_inference_steps=steps,
        class_labels=labels,
        generator=[_generator(seed, start + i) for i in range(len(noise))],
    )


def _generator(seed: int, sample: int) -> torch.Generator:
    """The sampler's noise for one sample; apart from calibration's and from every other seed's."""
    digest = hashlib.sha256(f"evaluation {seed} {sample}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def finite(value: float) -> float | None:
    """JSON knows no infinity: None stands for it."""
    return value if math.isfinite(value) else None
