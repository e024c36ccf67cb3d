"""A quantized denoiser against the full-precision one, from the same noise: at each step, and at the end of the way."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ptq_tdq.calib_data import LoadedModel, Sampled, finite_outputs, new_schedule, sample_generator
from ptq_tdq.calib_data.collect import Progress, axis_of
from ptq_tdq.calls import Calls, Recorder, prediction
from ptq_tdq.correction import Corrected
from ptq_tdq.errors import NonFiniteError
from ptq_tdq.evaluate.metrics import ratio_db, sqnr_db

PURPOSE = "evaluation"  # of the noise, which calibration never sees


@dataclass(frozen=True, eq=False)
class Reference:
    """Full-precision samples, with every call of the denoiser that led to the first R of them.

    ``conditions`` has one entry per sample (a class, a prompt or None), ``latents`` [N, ...] and ``images``
    [N, C, H, W] are those of :class:`~ptq_tdq.calib_data.Sampled`. ``calls`` are the recorded calls, their
    ``trajectory`` is the number of the sample; ``predictions`` has one tensor [rows, ...] for each of their groups.
    """

    model: LoadedModel
    num_inference_steps: int
    seed: int
    conditions: list[Any]
    calls: Calls
    predictions: list[Tensor]
    latents: Tensor
    images: Tensor | None

    @property
    def recorded(self) -> int:
        """R, the samples whose calls were kept."""
        return len(self.calls.trajectory.unique())

    def sample(self, denoiser: nn.Module, on_progress: Progress | None = None) -> Sampled:
        """:func:`run` ``denoiser`` as the full-precision one was run."""
        return run(denoiser, self.model, self.conditions, self.num_inference_steps, self.seed, on_progress)


@dataclass(frozen=True)
class Comparison:
    """SQNR in dB of the prediction at each time step (on the full-precision trajectory) and of the final latents.

    ``t`` are the scheduler's time steps in sampling order. The prediction is whatever the denoiser predicts: noise,
    velocity, or the sample itself.
    """

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


def make_reference(
    model: LoadedModel,
    *,
    samples: int,
    num_inference_steps: int,
    seed: int,
    recorded: int | None = None,
    on_progress: Progress | None = None,
) -> Reference:
    """Sample with full precision, as the model's own sampler does it.

    The calls of the first ``recorded`` samples are kept, by default of all. ``on_progress(done, total)`` counts
    samples.

    Raises :class:`~ptq_tdq.errors.NonFiniteError` naming t when the denoiser gives NaN or Inf.
    """
    kept = samples if recorded is None else min(recorded, samples)
    conditions = model.sampler.conditions(samples)
    recorder, parts = Recorder(model.denoiser), list[Sampled]()
    with finite_outputs(model.denoiser):
        for batch in _batches(samples, model.sampler.batch):
            wanted = torch.arange(batch.start, batch.stop) < kept
            recorder.begin(batch.start, len(wanted), lambda step, wanted=wanted: wanted)  # type: ignore[misc]
            schedule = new_schedule(model.sampler)
            with recorder.listening() if bool(wanted.any()) else nullcontext():
                parts.append(
                    _run_batch(model.denoiser, model, conditions[batch], num_inference_steps, seed, batch, schedule)
                )
            if on_progress is not None:
                on_progress(batch.stop, samples)
    sampled, calls = _joined(parts), recorder.calls(axis_of(recorder, schedule))
    # What the denoiser gives in the batches of a comparison; in those of the sampler the last digits are others.
    predictions = replay(model.denoiser, calls, model.sampler.batch)
    return Reference(model, num_inference_steps, seed, conditions, calls, predictions, sampled.latents, sampled.images)


def run(
    denoiser: nn.Module,
    model: LoadedModel,
    conditions: Sequence[Any],
    num_inference_steps: int,
    seed: int,
    on_progress: Progress | None = None,
) -> Sampled:
    """Sample with ``denoiser`` in the place of the model's own, from the noise of :func:`make_reference`.

    All noise of a sample follows from ``seed`` and its number. ``on_progress(done, total)`` counts samples.
    Raises :class:`~ptq_tdq.errors.NonFiniteError` for samples with NaN or Inf.
    """
    parts = []
    for batch in _batches(len(conditions), model.sampler.batch):
        schedule = new_schedule(model.sampler)
        parts.append(_run_batch(denoiser, model, conditions[batch], num_inference_steps, seed, batch, schedule))
        if on_progress is not None:
            on_progress(batch.stop, len(conditions))
    return _joined(parts)


def compare(reference: Reference, denoiser: nn.Module, sampled: Sampled | None = None) -> Comparison:
    """Measure ``denoiser`` against the reference; ``sampled`` is its :meth:`Reference.sample`, where known.

    t is that of the denoiser's interval tables: an axis that is stretched over values differs from run to run.
    """
    model, calls = reference.model, reference.calls
    axis = getattr(denoiser, "axis", calls.axis)
    steps, rows = replace(calls, axis=axis).t.unique(return_inverse=True)
    sums = torch.zeros(2, len(steps), dtype=torch.float64)  # of the squared signal and of the squared error
    found = replay(denoiser, calls, model.sampler.batch)
    for (_, span), expected, mine in zip(calls.spans(), reference.predictions, found, strict=True):
        for total, values in zip(sums, (expected.double(), expected.double() - mine.double()), strict=True):
            total.index_add_(0, rows[span], values.square().flatten(1).sum(1))
    if sampled is None:
        sampled = reference.sample(denoiser)
    # samplers go down from t = T: the order of sampling, also where a step is visited twice
    ratios = [ratio_db(*total) for total in sums.T.flip(0).tolist()]
    return Comparison(tuple(steps.flip(0).tolist()), tuple(ratios), sqnr_db(reference.latents, sampled.latents))


def replay(denoiser: nn.Module, calls: Calls, batch: int) -> list[Tensor]:
    """Predictions of ``denoiser`` for recorded calls, ``batch`` rows at once: float32 on the CPU, one per group."""
    found: list[list[Tensor]] = [[] for _ in calls.groups]
    starts = [span.start for _, span in calls.spans()]
    for rows, predicted in replayed(denoiser, calls, batch):
        found[bisect_right(starts, rows.start) - 1].append(predicted)
    return [torch.cat(parts) for parts in found]


@torch.no_grad()
def replayed(denoiser: nn.Module, calls: Calls, batch: int) -> Iterator[tuple[slice, Tensor]]:
    """What :func:`replay` joins: some rows and their prediction after the other."""
    # sessions of other runtimes have no device and take what is on the CPU
    device = torch.device(getattr(denoiser, "device", "cpu"))
    for rows in calls.chunks(batch):
        arguments = pytree.tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, calls.inputs(rows))
        yield rows, prediction(denoiser(**arguments)).float().cpu()


def finite(value: float) -> float | None:
    """JSON knows no infinity: None stands for it."""
    return value if math.isfinite(value) else None


def _batches(count: int, size: int) -> Iterator[slice]:
    return (slice(i, min(i + size, count)) for i in range(0, count, size))


def _run_batch(
    denoiser: nn.Module,
    model: LoadedModel,
    conditions: Sequence[Any],
    num_inference_steps: int,
    seed: int,
    batch: slice,
    schedule: Any,
) -> Sampled:
    generators = [sample_generator(PURPOSE, seed, i) for i in range(batch.start, batch.stop)]
    if isinstance(denoiser, Corrected):
        denoiser.lower_noise(schedule)
    sampled = model.sampler.run(denoiser, conditions, generators, num_inference_steps, schedule)
    if not bool(torch.isfinite(sampled.latents).all()):
        raise NonFiniteError(
            f"The samples of {type(denoiser).__name__} have NaN or Inf; calibrate with more bits or more samples."
        )
    return sampled


def _joined(parts: Sequence[Sampled]) -> Sampled:
    images = [part.images for part in parts if part.images is not None]
    return Sampled(torch.cat([part.latents for part in parts]), torch.cat(images) if images else None)
