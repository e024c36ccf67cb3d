"""From a calibrated artifact and its full-precision model to a fine-tuned one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ptq_tdq import processes
from ptq_tdq.ambient import undisturbed
from ptq_tdq.artifacts import CONFIG_FILE, Artifact, check_base_model, encode_artifact
from ptq_tdq.calib_data import LoadedModel, Original, collect, find_original
from ptq_tdq.calls import Calls
from ptq_tdq.errors import CalibrationSetError, ConfigError
from ptq_tdq.finetuning.config import KEEP, FinetuneConfig
from ptq_tdq.finetuning.data import Data, RecordedCalls
from ptq_tdq.finetuning.files import read_data
from ptq_tdq.finetuning.sources import begin_sources, check_moving
from ptq_tdq.finetuning.student import Student
from ptq_tdq.finetuning.train import IterationReport, Training, segments
from ptq_tdq.load import Given, as_artifact, build_quantized
from ptq_tdq.quantized_model import QuantizedModel
from ptq_tdq.recon import RunDirectory
from ptq_tdq.trace import require_rows
from ptq_tdq.wrap import folded_copy

_log = logging.getLogger(__name__)
THINNING = 8  # each trajectory gives every so many of its steps: trajectories count, not rows
NUMBERS = 4  # numbers that a checkpoint holds of each parameter: itself, its average and two moments
PROBED = 4  # of the calls that judge, in which unknown intervals are observed


@undisturbed()
@processes.together()
def finetune(
    model: Any,
    artifact: Given,
    config: FinetuneConfig | None = None,
    data: Calls | str | Path | None = None,
    *,
    prompts: str | Sequence[str] | None = None,
    classes: Sequence[int] | None = None,
    call: Mapping[str, Any] | None = None,
    run_directory: str | Path | None = None,
    on_iteration: Callable[[IterationReport], None] = lambda report: None,
    on_notice: Callable[[str], None] = _log.warning,
) -> QuantizedModel:
    """Train weights and intervals of a calibrated model together; neither ``model`` nor ``artifact`` change.

    ``model`` is the full-precision model: a pipeline of diffusers, what :func:`~ptq_tdq.load_model` gives, or, with
    ``data`` recorded of it (:func:`ptq_tdq.record`), any module. ``artifact`` is a folder, a hub id, or what
    :func:`~ptq_tdq.calibrate` gave::

        quantized = calibrate(pipe, preset("default", scheme="W3A4"))
        pipe.unet = finetune(pipe, quantized, FinetuneConfig(iterations=2000))

    Without ``data`` the model samples trajectories (``prompts``, ``classes`` and ``call`` say of what) and learns to
    predict on them what full precision does. ``data`` may be recorded calls, a folder of images or an npz file
    (:func:`~ptq_tdq.finetuning.files.read_data`). With a ``run_directory`` an interrupted run goes on at its last
    checkpoint. Processes that torch.distributed has joined, and that call this with the same, share each batch. The
    result's metrics have the losses on held-out samples before and after ("finetune"). Quantizer ``nipq`` draws its
    noise from torch's own generator, so it is repeatable in one thread at a time.

    Raises before the first iteration: :class:`~ptq_tdq.errors.ArtifactMismatchError` for another model's artifact,
    :class:`~ptq_tdq.errors.ConfigError` and :class:`~ptq_tdq.errors.CalibrationSetError` for choices and data that do
    not fit, :class:`~ptq_tdq.errors.ResumeError` for another run in the directory; at any time
    :class:`~ptq_tdq.errors.NonFiniteError` (NaN or Inf; names the iteration and the layer).
    """
    config = FinetuneConfig() if config is None else config
    if not isinstance(config, FinetuneConfig):
        raise ConfigError(f"config must be a FinetuneConfig. Got a {type(config).__name__} instead.")
    if not isinstance(data, Calls | str | Path | None):
        raise CalibrationSetError(
            "data must be what ptq_tdq.record gives, or the path of images or of an npz file. "
            f"Got a {type(data).__name__} instead."
        )
    found = as_artifact(artifact)
    component = None if isinstance(model, nn.Module | LoadedModel) else found.config["base_model"].get("component")
    sampled: dict[str, Any] = {"prompts": prompts, "classes": classes, "call": call}
    original = find_original(model, recorded=data is not None, component=component, **sampled)
    check_start(original, found, config, data)
    source = read(original, found, config, data)
    identity = partial(_identity, found, config, source)
    processes.check_alike(lambda: identity() | {"run_directory": run_directory is not None})
    denoiser = original.denoiser
    device = next(denoiser.parameters()).device
    teacher, quantized = folded_copy(denoiser), build_quantized(found, denoiser).to(device)
    begin_sources(quantized, config, source.steps, [batch.arguments for batch in source.judges()[:PROBED]])
    training = Training(Student(quantized, teacher, config), teacher, source, config)
    kept = None
    if run_directory is not None:
        kept = RunDirectory(run_directory, identity(), on_notice=on_notice)
    before = training.judge()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        training.run(kept, on_iteration)
    after = training.judge()
    if after >= before:
        on_notice(
            f"The loss on held-out samples did not fall ({before:.4g} before, {after:.4g} after); "
            "lower the learning rates, or take more iterations or trajectories."
        )
    finished = training.student.finish()
    _describe(finished, found, config, source, {"before": before, "after": after}, training.losses)
    return finished


def check_start(model: Original, artifact: Artifact, config: FinetuneConfig, data: Calls | str | Path | None) -> None:
    """Raise what :func:`finetune` would for a model, choices and kind of data that do not fit together."""
    shares = processes.count() * config.accumulation
    if config.batch_size % shares:
        raise ConfigError(
            f"batch_size must be a multiple of accumulation times the number of processes ({shares}). "
            f"Got {config.batch_size} instead."
        )
    if config.cuda_graph and next(model.denoiser.parameters()).device.type != "cuda":
        raise ConfigError("cuda_graph is for a model on a GPU; move it there (--device cuda), or leave it out.")
    check_moving(artifact.layers, config)
    check_base_model(artifact, model.sha256)
    if not isinstance(data, str | Path) and config.loss == "denoising":
        raise ConfigError("The loss 'denoising' needs images or latents (data); leave out the loss, or give data.")


def disk_bytes(model: Original) -> int:
    """What a run writes: a checkpoint beside the one before, and the artifact."""
    parameters: int = sum(parameter.numel() for parameter in model.denoiser.parameters())
    return 4 * (2 * NUMBERS + 1) * parameters


def read(model: Original, artifact: Artifact, config: FinetuneConfig, data: Calls | str | Path | None) -> Data:
    """The data of a run."""
    if isinstance(data, str | Path):
        if not isinstance(model, LoadedModel):
            raise ConfigError("Fine-tuning on files needs the model's scheduler; pass what load_model gives.")
        return read_data(Path(data), model, artifact.time_axis, denoise=config.loss != "distillation")
    if data is None:
        assert isinstance(model, LoadedModel)
        data = collect(model, **recipe(config))
    data.check()
    data = data.to(next(model.denoiser.parameters()).device)
    require_rows(folded_copy(model.denoiser), data)
    return RecordedCalls(replace(data, axis=artifact.time_axis))


def recipe(config: FinetuneConfig) -> dict[str, Any]:
    """Which trajectories a model samples to learn on them: arguments of :func:`~ptq_tdq.calib_data.collect`."""
    thinning = min(THINNING, config.num_inference_steps, config.trajectories)
    return {
        "samples_per_step": config.trajectories // thinning,
        "calibration_steps": config.num_inference_steps,
        "num_inference_steps": config.num_inference_steps,
        "thinning": thinning,
        "seed": config.seed,
    }


def _identity(artifact: Artifact, config: FinetuneConfig, data: Data) -> dict[str, Any]:
    """What must not change between two sittings of one run."""
    choices = {key: value for key, value in config.to_dict().items() if key != "checkpoint_every"}
    return {
        "artifact": sha256(encode_artifact(artifact)[CONFIG_FILE]).hexdigest(),
        **{f"choice {key}": value for key, value in choices.items()},
        "data": data.identity,
        "number of processes": processes.count(),
        "threads": torch.get_num_threads(),
        "version of torch": torch.__version__,
    }


def _describe(
    finished: QuantizedModel,
    artifact: Artifact,
    config: FinetuneConfig,
    data: Data,
    held_out: dict[str, float],
    losses: Sequence[float],
) -> None:
    """Provenance and metrics: those of the artifact, as far as they still hold, and the run's own."""
    method = artifact.config["method"] if config.method == KEEP else config.method
    about = {"choices": config.to_dict(), "data_sha256": data.identity}
    finished.provenance = {**artifact.config, "method": method, "finetune": about}
    kept = ("coverage", "mean_bits", "notices", "reconstruction")
    finished.metrics = {key: value for key, value in artifact.metrics.items() if key in kept}
    finished.metrics["finetune"] = {"held_out": held_out, "losses": segments(losses)}
