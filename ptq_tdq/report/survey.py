"""What a report shows: the artifacts and, where the full-precision model is at hand, what was measured beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ptq_tdq.artifacts import Artifact
from ptq_tdq.calib_data import LoadedModel
from ptq_tdq.errors import ArtifactMismatchError
from ptq_tdq.evaluate.images import CAPTION_HEIGHT, columns_for, decode, grid
from ptq_tdq.evaluate.metrics import psnr_db, sqnr_db
from ptq_tdq.evaluate.trajectories import Reference, make_reference, run
from ptq_tdq.load import load_quantized
from ptq_tdq.report.measure import Activation, LayerErrors, measure_errors, observe_activations

PICTURES = 20  # samples shown of each model


@dataclass(frozen=True, eq=False)
class Measured:
    """What was measured on one artifact; ``images`` are its samples [N, 3, H, W] in [-1, 1], None without a decoder."""

    errors: LayerErrors
    activations: dict[str, Activation]
    latent_sqnr_db: float
    image_psnr_db: float | None
    images: Tensor | None


@dataclass(frozen=True, eq=False)
class Subject:
    """One artifact, its folder, and the name that the report gives it."""

    name: str
    folder: Path
    artifact: Artifact
    measured: Measured | None = None


@dataclass(frozen=True, eq=False)
class Survey:
    """All that a report is drawn from; ``notices`` are sentences about what is missing."""

    subjects: tuple[Subject, ...]
    reference: Reference | None = None
    images: Tensor | None = None
    seed: int = 0
    notices: tuple[str, ...] = field(default=())


def survey(
    subjects: Sequence[Subject],
    model: LoadedModel | None,
    *,
    samples: int = 20,
    num_inference_steps: int = 25,
    seed: int = 0,
    notices: Sequence[str] = (),
    on_progress: Callable[[str], None] = lambda text: None,
) -> Survey:
    """Measure each artifact against ``model`` on ``samples`` full-precision trajectories; without a model, nothing.

    Raises :class:`ArtifactMismatchError` for artifacts of different base models.
    """
    check_same_model(subjects)
    if model is None:
        return Survey(tuple(subjects), seed=seed, notices=tuple(notices))
    on_progress(f"Sampling {samples} trajectories in full precision")
    reference = make_reference(model, samples=samples, num_inference_steps=num_inference_steps, seed=seed)
    said = [*notices]
    drawable = model.vae is not None or model.unet.config.out_channels in (1, 3)
    if not drawable:
        said.append("The model has no VAE to turn its latents into images, so there are no sample pictures.")
    if reference.class_labels is None:
        said.append("The model has no classes, so activations are not compared between classes.")
    images = decode(model, reference.latents) if drawable else None
    plans: dict[tuple[tuple[str, tuple[int, ...]], ...], dict[str, Activation]] = {}
    done = []
    for i, subject in enumerate(subjects):
        on_progress(f"Measuring {subject.name} ({i + 1} of {len(subjects)})")
        layers = subject.artifact.layers
        plan = tuple((q.name, layer.splits) for layer in layers for q in layer.inputs)
        if plan not in plans:
            plans[plan] = observe_activations(layers, reference)
        done.append(_measure(subject, reference, plans[plan], images, seed))
    return Survey(tuple(done), reference, images, seed, tuple(said))


def _measure(
    subject: Subject, reference: Reference, activations: dict[str, Activation], images: Tensor | None, seed: int
) -> Subject:
    quantized = load_quantized(subject.folder)
    errors = measure_errors(quantized, reference)
    latents = run(
        quantized, reference.model, reference.noise, reference.class_labels, reference.num_inference_steps, seed
    )
    mine = None if images is None else decode(reference.model, latents)
    psnr = None if images is None or mine is None else psnr_db(images, mine, peak=2.0)
    measured = Measured(errors, activations, sqnr_db(reference.latents, latents), psnr, mine)
    return replace(subject, measured=measured)


def check_same_model(subjects: Sequence[Subject]) -> None:
    """Raise :class:`ArtifactMismatchError` unless all artifacts are of the same base model."""
    first = subjects[0]
    for other in subjects[1:]:
        if other.artifact.config["base_model"]["sha256"] != first.artifact.config["base_model"]["sha256"]:
            raise ArtifactMismatchError(
                f"'{first.name}' and '{other.name}' were made from different models; make a report for each."
            )


def sheet(images: Tensor, num_classes: int) -> Image.Image:
    """The first :data:`PICTURES` images [N, C, H, W] as one picture without margins."""
    shown = images[:PICTURES]
    picture = grid({"": shown}, columns_for(len(shown), num_classes), scale=1)
    return picture.crop((0, CAPTION_HEIGHT, picture.width, picture.height))


def times(reference: Reference) -> Tensor:
    """The time step of each step of the sampler [K]."""
    return torch.stack([t[0] for t in reference.t]).float()
