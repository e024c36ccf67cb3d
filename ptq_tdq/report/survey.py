"""What a report shows: the artifacts and, where the full-precision model is at hand, what was measured beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from torch.nn import functional

from ptq_tdq.artifacts import Artifact
from ptq_tdq.calib_data import LoadedModel
from ptq_tdq.calib_data.collect import Progress
from ptq_tdq.config import Role
from ptq_tdq.errors import ArtifactMismatchError
from ptq_tdq.evaluate.images import CAPTION_HEIGHT, captions_of, columns_for, count_classes, grid
from ptq_tdq.evaluate.metrics import psnr_db, sqnr_db
from ptq_tdq.evaluate.trajectories import Reference, make_reference
from ptq_tdq.load import load_quantized
from ptq_tdq.plan import find_roles
from ptq_tdq.report.measure import Activation, LayerErrors, measure_errors, observe_activations
from ptq_tdq.trace import trace
from ptq_tdq.wrap import folded_copy

PICTURES = 20  # samples shown of each model
LARGEST = 160  # pixels of the longer side of a picture
CAPTIONED = 96  # pixels that a picture with words above it is wide, at least


@dataclass(frozen=True, eq=False)
class Measured:
    """What was measured on one artifact; ``images`` are its samples [N, C, H, W] in [-1, 1], if they are images."""

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
    """All that a report is drawn from; ``roles`` are those of the layers, ``notices`` say what is missing."""

    subjects: tuple[Subject, ...]
    reference: Reference | None = None
    roles: dict[str, set[Role]] = field(default_factory=dict)
    seed: int = 0
    notices: tuple[str, ...] = ()


def survey(
    subjects: Sequence[Subject],
    model: LoadedModel | None,
    *,
    samples: int = 20,
    num_inference_steps: int = 25,
    seed: int = 0,
    notices: Sequence[str] = (),
    on_progress: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> Survey:
    """Measure each artifact against ``model`` on ``samples`` full-precision trajectories; without a model, nothing.

    ``on_progress(name, done, total)`` counts what is done of each part.

    Raises :class:`ArtifactMismatchError` for artifacts of different base models.
    """
    check_same_model(subjects)
    if model is None:
        return Survey(tuple(subjects), seed=seed, notices=tuple(notices))
    sampling = partial(on_progress, "Sampling in full precision")
    sampling(0, samples)
    reference = make_reference(
        model, samples=samples, num_inference_steps=num_inference_steps, seed=seed, on_progress=sampling
    )
    # the tables' own axis: an axis that is stretched over the values that were seen differs from run to run
    reference = replace(reference, calls=replace(reference.calls, axis=subjects[0].artifact.time_axis))
    observed: dict[tuple[tuple[str, tuple[int, ...]], ...], dict[str, Activation]] = {}
    done = []
    for subject in subjects:
        layers = subject.artifact.layers
        seen_by = tuple((q.name, layer.splits) for layer in layers for q in layer.inputs)
        if seen_by not in observed:
            observed[seen_by] = observe_activations(layers, reference, partial(on_progress, "Watching activations"))
        progress = partial(on_progress, f"Measuring {subject.name}")
        done.append(_measure(subject, reference, observed[seen_by], progress))
    roles = find_roles(trace(folded_copy(model.denoiser), reference.calls))
    return Survey(tuple(done), reference, roles, seed, (*notices, *_missing(reference)))


def _measure(
    subject: Subject, reference: Reference, activations: dict[str, Activation], on_progress: Progress
) -> Subject:
    quantized = load_quantized(subject.folder, device=reference.model.denoiser.device)
    errors = measure_errors(quantized, reference, on_progress)
    found = reference.sample(quantized)
    full, mine = reference.images, found.images
    psnr = None if full is None or mine is None else psnr_db(full, mine, peak=2.0)
    latent_sqnr_db = sqnr_db(reference.latents, found.latents)
    return replace(subject, measured=Measured(errors, activations, latent_sqnr_db, psnr, found.images))


def _missing(reference: Reference) -> Iterator[str]:
    """What a reader may look for in vain, or take for something else."""
    if reference.images is None:
        yield "The samples are sounds, or latents that no VAE turns into images: there are no sample pictures."
    elif reference.latents.ndim == 5:
        yield "The samples are videos; of each its first frame is shown and compared."
    if reference.conditions[0] is None:
        yield "The model has no classes and no prompts, so activations are not compared between them."


def check_same_model(subjects: Sequence[Subject]) -> None:
    """Raise :class:`ArtifactMismatchError` unless all artifacts are of the same base model."""
    first = subjects[0]
    for other in subjects[1:]:
        if other.artifact.config["base_model"]["sha256"] != first.artifact.config["base_model"]["sha256"]:
            raise ArtifactMismatchError(
                f"'{first.name}' and '{other.name}' were made from different models; make a report for each."
            )


def thumbnails(images: Tensor) -> Tensor:
    """The first :data:`PICTURES` images [N, C, H, W], large ones made smaller."""
    shown, longest = images[:PICTURES].float(), max(images.shape[2:])
    if longest <= LARGEST:
        return shown
    size = [max(1, round(n * LARGEST / longest)) for n in images.shape[2:]]
    return functional.interpolate(shown, size, mode="bilinear", antialias=True)


def sheet(images: Tensor, conditions: Sequence[Any]) -> Image.Image:
    """Images [N, C, H, W] as one picture without margins; large ones have their class or prompt above them."""
    captions = captions_of(conditions)[: len(images)] if images.shape[3] >= CAPTIONED else []
    picture = grid({"": images}, columns_for(len(images), count_classes(conditions)), scale=1, captions=captions)
    return picture.crop((0, CAPTION_HEIGHT, picture.width, picture.height))
