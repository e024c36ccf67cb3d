"""The full-precision side of an evaluation, made once and compared with any number of quantized models."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ptq_tdq.artifacts import write_atomic
from ptq_tdq.calib_data import REFERENCE_ID, LoadedModel
from ptq_tdq.calib_data.reference import Cifar10Classifier, load_classifier, reference_path
from ptq_tdq.evaluate import c10, quality
from ptq_tdq.evaluate.images import decode
from ptq_tdq.evaluate.metrics import psnr_db, sqnr_db
from ptq_tdq.evaluate.trajectories import BATCH, Progress, Reference, compare, finite, make_reference, run

RECORDED = BATCH
"""Samples whose every step is compared; all are compared at the end of their way."""


@dataclass(frozen=True, eq=False)
class Measured:
    """``results`` by name, JSON-ready (None stands for an infinite ratio), and the images [N, C, H, W] or None."""

    results: dict[str, Any]
    images: Tensor | None


@dataclass(frozen=True, eq=False)
class Baseline:
    """Full-precision samples of a model with one seed; ``described`` only for the embedded model, which has a
    classifier, and ``images`` None for latents that nothing turns into images.
    """

    reference: Reference
    seed: int
    images: Tensor | None
    classifier: Cifar10Classifier | None
    described: c10.Described | None

    def quality(self) -> dict[str, float]:
        """The full-precision samples against the data, in the classifier's features; empty without a classifier."""
        return self._against_data(self.described)

    def measure(self, unet: nn.Module, on_progress: Progress | None = None) -> Measured:
        """``unet`` against full precision from the same noise and, with a classifier, against the data."""
        full = self.reference
        model, labels, steps = full.model, full.class_labels, full.num_inference_steps
        latents = run(unet, model, full.noise, labels, steps, self.seed, on_progress)
        results: dict[str, Any] = compare(full, unet, self.seed, latents).to_dict()
        images = to_images(model, latents)
        if images is None or self.images is None:
            return Measured(results, None)
        results["image_sqnr_db"] = finite(sqnr_db(self.images, images))
        results["image_psnr_db"] = finite(psnr_db(self.images, images, peak=2.0))
        if self.classifier is not None and self.described is not None:
            found = c10.describe(self.classifier, images)
            results |= c10.against_full_precision(self.described, found) | self._against_data(found)
        return Measured(results, images)

    def _against_data(self, found: c10.Described | None) -> dict[str, float]:
        labels = self.reference.class_labels
        return {} if found is None or labels is None else c10.against_data(found, labels, self.seed)


def make_baseline(
    model: LoadedModel, *, samples: int, num_inference_steps: int, seed: int, on_progress: Progress | None = None
) -> Baseline:
    """Sample with full precision; ``on_progress(done, total)`` counts samples.

    Raises :class:`~ptq_tdq.errors.MissingExtraError` without torchmetrics, which the embedded model's metrics need.
    """
    if is_embedded(model):
        quality.require()
    reference = make_reference(
        model,
        samples=samples,
        num_inference_steps=num_inference_steps,
        seed=seed,
        recorded=RECORDED,
        on_progress=on_progress,
    )
    images = to_images(model, reference.latents)
    if images is None or not is_embedded(model):
        return Baseline(reference, seed, images, None, None)
    classifier = load_classifier()
    return Baseline(reference, seed, images, classifier, c10.describe(classifier, images))


def is_embedded(model: LoadedModel) -> bool:
    """Whether this is the model that the embedded classifier belongs to."""
    return model.id == REFERENCE_ID or Path(model.id).resolve() == reference_path().resolve()


def to_images(model: LoadedModel, latents: Tensor) -> Tensor | None:
    """Images [N, C, H, W] in [-1, 1], or None for latents without a VAE."""
    if model.vae is None and latents.shape[1] not in (1, 3):
        return None
    return torch.cat([decode(model, part) for part in latents.split(BATCH)])


def save_baseline(path: Path, baseline: Baseline) -> None:
    """Keep all of it in a file, but for the classifier."""
    full = baseline.reference
    facts = {"steps": full.num_inference_steps, "seed": baseline.seed, "sha256": full.model.sha256}
    tensors = {"noise": full.noise, "latents": full.latents}
    tensors |= {f"{key}.{i}": x for key in ("x", "t", "prediction") for i, x in enumerate(getattr(full, key))}
    found = baseline.described
    optional = {"class_labels": full.class_labels, "images": baseline.images}
    optional |= {"features": found.features, "logits": found.logits} if found else {}
    tensors |= {name: value for name, value in optional.items() if value is not None}
    data = save({name: value.contiguous() for name, value in tensors.items()}, {"facts": json.dumps(facts)})
    write_atomic(path, data)


def load_baseline(
    path: Path, model: LoadedModel, *, samples: int, num_inference_steps: int, seed: int
) -> Baseline | None:
    """What :func:`save_baseline` kept, or None where that is absent, damaged or of another request."""
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads(file.metadata()["facts"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        calls = ([tensors[f"{key}.{i}"] for i in range(num_inference_steps)] for key in ("x", "t", "prediction"))
        x, t, prediction = (tuple(each) for each in calls)
        noise, latents = tensors["noise"], tensors["latents"]
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None
    if facts != {"steps": num_inference_steps, "seed": seed, "sha256": model.sha256} or len(noise) != samples:
        return None
    reference = Reference(model, num_inference_steps, noise, tensors.get("class_labels"), x, t, prediction, latents)
    described = c10.Described(tensors["features"], tensors["logits"]) if "features" in tensors else None
    return Baseline(reference, seed, tensors.get("images"), load_classifier() if described else None, described)
