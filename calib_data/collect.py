"""Collect a calibration set: run the full-precision sampler and keep what its U-Net receives at chosen steps."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ptq_tdq.cache import cache_folder
from ptq_tdq.calib_data.calibration_set import CalibrationSet
from ptq_tdq.calib_data.load import LoadedModel
from ptq_tdq.calib_data.sampling import Recorder, sample_latents, start_schedule
from ptq_tdq.calib_data.steps import StepDistribution, choose_steps
from ptq_tdq.errors import CalibrationSetError, ConfigError


def collect(
    model: LoadedModel,
    *,
    samples_per_step: int,
    calibration_steps: int,
    num_inference_steps: int,
    step_distribution: StepDistribution = "uniform",
    seed: int = 0,
    batch_size: int = 64,
    on_progress: Callable[[int, int], None] | None = None,
) -> CalibrationSet:
    """Run ``samples_per_step`` trajectories once each and keep ``calibration_steps`` steps of every one.

    The set holds N = samples_per_step x calibration_steps samples (Q-Diffusion: 256 x 20 = 5120), ordered by step, then
    by trajectory: sample j * samples_per_step + i is the j-th chosen step of trajectory i. Trajectory i of a
    class-conditional model has the class i mod num_classes. Its noise depends on (seed, i) alone, so ``batch_size``
    changes speed and memory but not the result, apart from rounding in the last digits.

    ``on_progress(done, total)`` counts calls of the U-Net.

    Raises :class:`ConfigError` for an impossible request, and :class:`~ptq_tdq.errors.NonFiniteError` naming t when
    the model returns NaN or Inf.
    """
    _check_request(samples_per_step, calibration_steps, num_inference_steps, batch_size)
    timesteps = start_schedule(model.scheduler, num_inference_steps).timesteps
    last_t = int(model.scheduler.config.num_train_timesteps)
    generators = [_generator("noise", seed, i) for i in range(samples_per_step)]
    choices = (_generator("steps", seed, i) for i in range(samples_per_step))
    chosen = [
        choose_steps(timesteps, calibration_steps, step_distribution, g, num_train_timesteps=last_t) for g in choices
    ]
    config = model.unet.config
    size = config.sample_size if isinstance(config.sample_size, (list, tuple)) else [config.sample_size] * 2
    x = torch.empty(calibration_steps, samples_per_step, config.in_channels, *size)
    t = torch.empty(calibration_steps, samples_per_step)
    labels = torch.arange(samples_per_step) % model.num_classes if model.num_classes else None
    done, total = 0, len(timesteps) * -(-samples_per_step // batch_size)

    def advance(index: int, t: float, latents: Tensor) -> None:
        nonlocal done
        done += 1
        if on_progress is not None:
            on_progress(done, total)

    for start in range(0, samples_per_step, batch_size):
        batch = range(start, min(start + batch_size, samples_per_step))
        recorder = Recorder(model.unet, _wanted([chosen[i] for i in batch], len(timesteps)))
        noise = torch.stack([torch.randn(x.shape[2:], generator=generators[i]) for i in batch])
        sample_latents(
            recorder,
            model.scheduler,
            noise=noise.to(model.unet.device, model.unet.dtype),
            num_inference_steps=num_inference_steps,
            class_labels=None if labels is None else labels[batch.start : batch.stop].to(model.unet.device),
            generator=generators[batch.start : batch.stop],
            on_step=advance,
        )
        for record in recorder.records:
            columns = record.rows + start
            rows = torch.tensor([chosen[i].index(record.step_index) for i in columns.tolist()])
            x[rows, columns], t[rows, columns] = record.x, record.t
    repeated = None if labels is None else labels.repeat(calibration_steps)
    recipe = make_recipe(
        model,
        samples_per_step=samples_per_step,
        calibration_steps=calibration_steps,
        num_inference_steps=num_inference_steps,
        step_distribution=step_distribution,
        seed=seed,
    )
    return CalibrationSet(x.flatten(0, 1), t.flatten(), repeated, recipe)


def make_recipe(
    model: LoadedModel,
    *,
    samples_per_step: int,
    calibration_steps: int,
    num_inference_steps: int,
    step_distribution: StepDistribution = "uniform",
    seed: int = 0,
) -> dict[str, Any]:
    """Name all that a calibration set depends on, as plain JSON values; the keys are those of :func:`collect`."""
    scheduler = json.dumps(dict(model.scheduler.config), sort_keys=True, default=str)
    return {
        "model_sha256": model.sha256,
        "dtype": str(model.unet.dtype).removeprefix("torch."),
        "scheduler": type(model.scheduler).__name__,
        "scheduler_sha256": hashlib.sha256(scheduler.encode()).hexdigest(),
        "num_train_timesteps": int(model.scheduler.config.num_train_timesteps),
        "num_classes": model.num_classes,
        "samples_per_step": samples_per_step,
        "calibration_steps": calibration_steps,
        "samples": samples_per_step * calibration_steps,
        "num_inference_steps": num_inference_steps,
        "step_distribution": step_distribution,
        "seed": seed,
    }


def collect_cached(
    model: LoadedModel,
    cache_dir: str | Path | None = None,
    *,
    batch_size: int = 64,
    on_progress: Callable[[int, int], None] | None = None,
    **recipe: Any,
) -> CalibrationSet:
    """Do what :func:`collect` does, or read its result from ``cache_dir`` when model and recipe are unchanged.

    ``recipe`` are the other arguments of :func:`collect`. A damaged file in the cache is collected again and replaced.
    Raises what :func:`collect` raises, and :class:`~ptq_tdq.errors.OutputError` for a cache that cannot be written.
    """
    wanted = make_recipe(model, **recipe)
    name = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:32]
    path = (cache_folder() if cache_dir is None else Path(cache_dir)) / f"calibration-{name}.safetensors"
    try:
        cached = CalibrationSet.load(path)
        if cached.recipe == wanted:
            return cached
    except CalibrationSetError:
        pass  # absent or damaged: a cache mends itself
    collected = collect(model, batch_size=batch_size, on_progress=on_progress, **recipe)
    collected.save(path)
    return collected


def _check_request(samples_per_step: int, calibration_steps: int, num_inference_steps: int, batch_size: int) -> None:
    counts = {
        "samples_per_step": samples_per_step,
        "calibration_steps": calibration_steps,
        "num_inference_steps": num_inference_steps,
        "batch_size": batch_size,
    }
    for name, count in counts.items():
        if count < 1:
            raise ConfigError(f"The '{name}' of a calibration set must be at least 1. Got {count} instead.")
    if calibration_steps > num_inference_steps:
        raise ConfigError(
            f"The {calibration_steps} calibration steps must be among the {num_inference_steps} inference steps; "
            "ask for fewer calibration steps or more inference steps."
        )


def _generator(purpose: str, seed: int, trajectory: int) -> torch.Generator:
    """Make a generator of its own; neighbouring seeds and trajectories share nothing."""
    digest = hashlib.sha256(f"{purpose} {seed} {trajectory}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _wanted(chosen: list[list[int]], steps: int) -> Tensor:
    """Mark the chosen (step index, trajectory) pairs: bool [steps, batch]."""
    wanted = torch.zeros(steps, len(chosen), dtype=torch.bool)
    for column, indices in enumerate(chosen):
        wanted[indices, column] = True
    return wanted
