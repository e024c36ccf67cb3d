"""From a full-precision model and a calibration set to a quantized model."""

from __future__ import annotations

import logging
import math
import platform
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ptq_tdq.artifacts import check_draft
from ptq_tdq.calib_data import CalibrationSet, check_unet, unet_sha256
from ptq_tdq.config import ACTIVATION_CHOICES, Config
from ptq_tdq.errors import CalibrationSetError
from ptq_tdq.plan import make_plan
from ptq_tdq.quantized_model import QuantizedModel, base_config
from ptq_tdq.recon import CHECKPOINT_FORM, RunDirectory, Samples, UnitReport, reconstruct
from ptq_tdq.scheme import Scheme
from ptq_tdq.timeaxis import require_covered

_log = logging.getLogger(__name__)


def calibrate(
    model: nn.Module,
    config: Config,
    calibration_set: CalibrationSet,
    *,
    model_id: str | None = None,
    run_directory: Path | None = None,
    weights_directory: Path | None = None,
    on_unit: Callable[[UnitReport], None] = lambda report: None,
    on_notice: Callable[[str], None] = _log.warning,
) -> QuantizedModel:
    """Quantize a copy of ``model`` block by block; the model itself stays as it is.

    ``model`` is a diffusers UNet2DModel (or a module with its call signature and ``config``); ``model_id`` is its name
    in the artifact. With a ``run_directory`` finished units are kept there and an interrupted run goes on where it
    stopped. With a ``weights_directory`` as well, phase W is kept there: runs that differ only in what phase A decides
    may share it, one after the other. ``on_unit`` gets a report of each finished unit. ``on_notice`` gets a sentence
    for each damaged file of an unfinished run, whose unit is done again; by default that is logged. The result's
    :attr:`static` holds the static MSE intervals, its :attr:`metrics` the losses of each unit ("reconstruction").

    Raises before the first unit: :class:`~ptq_tdq.errors.ModelError` (no timestep argument, 0 layers),
    :class:`CalibrationSetError` for a set that does not fit the model, :class:`~ptq_tdq.errors.TimestepError` for a
    step beyond its axis, :class:`~ptq_tdq.errors.ConfigError` for what an artifact cannot say (a ``model_id`` that is
    no text) and :class:`~ptq_tdq.errors.ResumeError` (another run in the directory); at any time
    :class:`~ptq_tdq.errors.NonFiniteError` (NaN or Inf; names the layer and t).
    """
    check_unet(model)
    _check_fit(model, calibration_set)
    samples = Samples(
        calibration_set.x.to(next(model.parameters()).dtype), calibration_set.t, calibration_set.class_labels
    )
    plan = make_plan(model, config, lambda: model(**samples.inputs(slice(0, 2))))
    quantized = QuantizedModel.copy_of(model, plan)
    quantized.provenance = provenance(model, config, calibration_set, model_id)
    check_draft(quantized.provenance, [record.to_dict() for record in plan])
    steps = quantized.provenance["time_axis"]["num_train_timesteps"]
    require_covered(calibration_set.t, steps - 1)
    run = _open_run(run_directory, weights_directory, quantized.provenance, on_notice)
    reports: list[UnitReport] = []

    def hear(report: UnitReport) -> None:
        reports.append(report)
        on_unit(report)

    quantized.static = reconstruct(quantized, samples, config, steps, run=run, on_unit=hear)
    quantized.metrics = {"reconstruction": losses(reports)}
    return quantized.finalize()


def check_choices(model: Any, config: Config) -> None:
    """Raise what :func:`calibrate` would for choices that do not fit ``model``, before there is a calibration set."""
    size = model.config.sample_size
    height, width = size if isinstance(size, list | tuple) else (size, size)
    labels = torch.zeros(1, dtype=torch.int64) if model.config.num_class_embeds else None
    blank = Samples(torch.zeros(1, model.config.in_channels, height, width, dtype=model.dtype), torch.zeros(1), labels)
    make_plan(model, config, lambda: model(**blank.inputs(slice(0, 1))))


def _open_run(
    folder: Path | None, weights: Path | None, document: dict[str, Any], on_notice: Callable[[str], None]
) -> RunDirectory | None:
    if folder is None:
        return None
    shared = RunDirectory(weights, weight_identity(document), on_notice=on_notice) if weights else None
    return RunDirectory(folder, identity(document), weights=shared, on_notice=on_notice)


def losses(reports: Iterable[UnitReport]) -> dict[str, list[dict[str, Any]]]:
    """Losses of each unit by phase, in execution order, JSON-ready: "before" learning (of the first intervals, nearest
    rounding) and "after", None for one that overflows float32.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for r in reports:
        values = {"before": r.before, "after": r.after}
        finite = {key: value if math.isfinite(value) else None for key, value in values.items()}
        found.setdefault(r.phase, []).append({"unit": r.unit, **finite})
    return found


def _check_fit(model: Any, calibration_set: CalibrationSet) -> None:
    channels, has_labels = int(model.config.in_channels), calibration_set.class_labels is not None
    if calibration_set.x.shape[1] != channels:
        raise CalibrationSetError(
            f"The calibration set has {calibration_set.x.shape[1]} channels, the model takes {channels}; "
            "collect it with this model."
        )
    if has_labels != bool(getattr(model.config, "num_class_embeds", None)):
        with_or_without = "with" if has_labels else "without"
        raise CalibrationSetError(
            f"The calibration set is {with_or_without} class labels, unlike the model; collect it with this model."
        )
    if "num_train_timesteps" not in calibration_set.recipe:
        raise CalibrationSetError(
            "The recipe of the calibration set does not name num_train_timesteps, the length of the interval tables; "
            "make the set with collect(), or add it."
        )


def provenance(model: Any, config: Config, calibration_set: CalibrationSet, model_id: str | None) -> dict[str, Any]:
    """The artifact's config document: what the quantized model was made from, and with which choices."""
    return {
        "base_model": {"id": model_id or _name(model), "sha256": unet_sha256(model)},
        "model_config": base_config(model),
        "scheme": config.scheme,
        "method": config.method,
        "preset": config.preset,
        "choices": config.to_dict(),
        "time_axis": {"num_train_timesteps": calibration_set.recipe["num_train_timesteps"]},
        "calibration_set": {"sha256": calibration_set.sha256, **calibration_set.recipe},
        "seed": config.seed,
        "versions": {name: version(name) for name in ("ptq-tdq", "torch", "diffusers", "numpy", "safetensors")}
        | {"python": platform.python_version()},
    }


def identity(document: dict[str, Any]) -> dict[str, Any]:
    """What must not change between two sittings of one run, by key; causes come before what follows from them."""
    return {
        "form of its files": CHECKPOINT_FORM,
        "model": document["base_model"]["sha256"],
        **{f"choice {key}": value for key, value in document["choices"].items()},
        "calibration_set": document["calibration_set"]["sha256"],
        "threads": torch.get_num_threads(),  # the order of sums, and so the bytes, depend on it
        **{f"version of {key}": value for key, value in document["versions"].items()},
    }


def weight_identity(document: dict[str, Any]) -> dict[str, Any]:
    """The part of :func:`identity` that phase W depends on."""
    found = {
        key: value for key, value in identity(document).items() if key.removeprefix("choice ") not in ACTIVATION_CHOICES
    }
    return {**found, "choice scheme": f"W{Scheme.parse(document['scheme']).weight_bits}"}


def _name(model: Any) -> str:
    return Path(str(getattr(model.config, "_name_or_path", "") or type(model).__name__)).name
