"""The full-precision side of an evaluation, made once and compared with any number of quantized models."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ptq_tdq.atomic import write_atomic
from ptq_tdq.calib_data import LoadedModel, is_embedded
from ptq_tdq.calib_data.collect import Progress
from ptq_tdq.calls import Calls
from ptq_tdq.errors import CalibrationSetError
from ptq_tdq.evaluate import c10, quality
from ptq_tdq.evaluate.metrics import psnr_db, sqnr_db
from ptq_tdq.evaluate.trajectories import Reference, compare, finite, make_reference
from ptq_tdq.files import check_tensors
from ptq_tdq.identity import scheduler_config

RECORDED = 50
"""Samples whose every step is compared; all are compared at the end of their way."""

CALLS, TENSORS = "calls.safetensors", "samples.safetensors"  # files of a saved baseline


@dataclass(frozen=True, eq=False)
class Evaluation:
    """``results`` by name, JSON-ready (None stands for an infinite ratio), and the images [N, C, H, W] or None."""

    results: dict[str, Any]
    images: Tensor | None


@dataclass(frozen=True, eq=False)
class Baseline:
    """Full-precision samples of a model with one seed; ``classifiers`` and what they say of them (``described``) only
    for the embedded models, whose images they know.
    """

    reference: Reference
    classifiers: c10.Classifiers | None
    described: c10.Described | None

    @property
    def images(self) -> Tensor | None:
        """The full-precision images [N, C, H, W] in [-1, 1]; None for sounds and for latents without a VAE."""
        return self.reference.images

    def quality(self) -> dict[str, float]:
        """The full-precision samples against the data, in the classifiers' features; empty without classifiers."""
        return self._against_data(self.described)

    def measure(self, denoiser: nn.Module, on_progress: Progress | None = None) -> Evaluation:
        """``denoiser`` against full precision from the same noise and, with classifiers, against the data."""
        full = self.reference
        sampled = full.sample(denoiser, on_progress)
        results: dict[str, Any] = compare(full, denoiser, sampled).to_dict()
        if full.images is None or sampled.images is None:
            return Evaluation(results, None)
        results["image_sqnr_db"] = finite(sqnr_db(full.images, sampled.images))
        results["image_psnr_db"] = finite(psnr_db(full.images, sampled.images, peak=2.0))
        if self.classifiers is not None and self.described is not None:
            found = c10.describe(self.classifiers, sampled.images)
            results |= c10.against_full_precision(self.described, found) | self._against_data(found)
        return Evaluation(results, sampled.images)

    def _against_data(self, found: c10.Described | None) -> dict[str, float]:
        if found is None:
            return {}
        conditions = self.reference.conditions
        labels = None if conditions[0] is None else torch.tensor(conditions)
        return c10.against_data(found, labels, self.reference.seed)


def make_baseline(
    model: LoadedModel, *, samples: int, num_inference_steps: int, seed: int, on_progress: Progress | None = None
) -> Baseline:
    """Sample with full precision; ``on_progress(done, total)`` counts samples.

    Raises :class:`~ptq_tdq.errors.MissingExtraError` without torchmetrics, which the embedded models' metrics need.
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
    if reference.images is None or not is_embedded(model):
        return Baseline(reference, None, None)
    classifiers = c10.load_classifiers()
    return Baseline(reference, classifiers, c10.describe(classifiers, reference.images))


def baseline_request(model: LoadedModel, *, samples: int, num_inference_steps: int, seed: int) -> dict[str, Any]:
    """All that a baseline depends on, as plain JSON values."""
    scheduler = {"class": type(model.scheduler).__name__, **scheduler_config(model.scheduler)}
    request = {
        "model_sha256": model.sha256,
        "dtype": str(model.denoiser.dtype),
        "sampler": model.sampler.recipe(),
        "scheduler": scheduler,
        "samples": samples,
        "num_inference_steps": num_inference_steps,
        "seed": seed,
    }
    plain: dict[str, Any] = json.loads(json.dumps(request, sort_keys=True, default=str))
    return plain


def save_baseline(folder: Path, baseline: Baseline) -> None:
    """Keep all of it in two files, but for the model and the classifiers."""
    full, found = baseline.reference, baseline.described
    request = baseline_request(
        full.model, samples=len(full.latents), num_inference_steps=full.num_inference_steps, seed=full.seed
    )
    tensors = {"latents": full.latents, **{f"prediction.{i}": value for i, value in enumerate(full.predictions)}}
    tensors |= {} if full.images is None else {"images": full.images}
    tensors |= {} if found is None else vars(found)
    facts = {"request": request, "conditions": full.conditions, "calls": full.calls.sha256}
    contiguous = {name: value.contiguous() for name, value in tensors.items()}
    full.calls.save(folder / CALLS)
    write_atomic(folder / TENSORS, save(contiguous, {"facts": json.dumps(facts)}))


def load_baseline(folder: Path, model: LoadedModel, **request: int) -> Baseline | None:
    """What :func:`save_baseline` kept, or None where that is absent, damaged or of another request.

    ``request`` are samples, num_inference_steps and seed, as :func:`make_baseline` takes them.
    """
    try:
        calls = Calls.load(folder / CALLS)
        check_tensors(folder / TENSORS)
        with safe_open(folder / TENSORS, framework="pt") as file:
            facts = json.loads(file.metadata()["facts"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if facts["request"] != baseline_request(model, **request) or facts["calls"] != calls.sha256:
            return None
        return _restored(model, calls, facts["conditions"], tensors, request)
    except (CalibrationSetError, OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None


def _restored(
    model: LoadedModel, calls: Calls, conditions: list[Any], tensors: dict[str, Tensor], request: Mapping[str, int]
) -> Baseline:
    reference = Reference(
        model,
        request["num_inference_steps"],
        request["seed"],
        conditions,
        calls,
        [tensors[f"prediction.{i}"] for i in range(len(calls.groups))],
        tensors["latents"],
        tensors.get("images"),
    )
    if "features" not in tensors:
        return Baseline(reference, None, None)
    described = c10.Described(*(tensors[field.name] for field in fields(c10.Described)))
    return Baseline(reference, c10.load_classifiers(), described)
