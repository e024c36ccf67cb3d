"""From a full-precision model and a calibration set to a quantized model."""

from __future__ import annotations

import logging
import math
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from ptq_tdq import launch, processes
from ptq_tdq.ambient import undisturbed
from ptq_tdq.artifacts import check_draft
from ptq_tdq.calib_data import LoadedModel, Original, collect, find_original, first_call
from ptq_tdq.calls import Calls
from ptq_tdq.choices import ungrouped
from ptq_tdq.config import Config
from ptq_tdq.errors import CalibrationSetError, ConfigError, NonFiniteError
from ptq_tdq.fit import DROPOUT
from ptq_tdq.identity import base_config, first_nonfinite
from ptq_tdq.plan import Plan, make_plan
from ptq_tdq.quantized_model import QuantizedModel, buffer_dtypes
from ptq_tdq.recon import CACHE_BYTES, CHECKPOINT_FORM, Forecast, RunDirectory, UnitReport, make_forecast, reconstruct
from ptq_tdq.structure import beside_configuration
from ptq_tdq.wrap import folded_copy

_log = logging.getLogger(__name__)


@undisturbed()
@processes.together()
def calibrate(
    model: Any,
    config: Config,
    calls: Calls | None = None,
    *,
    component: str | None = None,
    prompts: str | Sequence[str] | None = None,
    classes: Sequence[int] | None = None,
    call: Mapping[str, Any] | None = None,
    model_id: str | None = None,
    run_directory: str | Path | None = None,
    weights_directory: str | Path | None = None,
    cache_budget: int = CACHE_BYTES,
    on_unit: Callable[[UnitReport], None] = lambda report: None,
    on_notice: Callable[[str], None] = _log.warning,
) -> QuantizedModel:
    """Quantize a copy of a denoiser unit by unit; the model itself stays as it is.

    ``model`` is a pipeline of diffusers, what :func:`~ptq_tdq.load_model` gives, or, with ``calls`` recorded of it
    (:func:`ptq_tdq.record`), any denoiser or module of one's own::

        pipe.transformer = calibrate(pipe, preset("default", scheme="W4A8"), prompts=["A red fox", ...])

    ``component`` names the denoiser of a pipeline that has several; ``prompts``, ``classes`` and ``call`` (further
    arguments such as guidance_scale) say what the pipeline samples for the calibration set, where there are no
    ``calls``; beside these the choices of group ``calibration`` have no effect. ``model_id`` is the model's
    name in the artifact. With a ``run_directory`` finished units are kept there and an interrupted run goes on where it
    stopped. With a ``weights_directory`` as well, phase W is kept there: runs that differ only in what phase A decides
    may share it, one after the other. Where more than ``cache_budget`` bytes flow between units, they lie in files that
    are gone with the run; as many may be held inside a unit whose weights are rounded, and more is computed again. The
    result is the same. ``on_unit`` gets a report of each finished unit. ``on_notice`` gets a
    sentence for each damaged file of an unfinished run, whose unit is done again; by default that is logged. The
    result's :attr:`static` holds the static MSE intervals, its :attr:`metrics` the losses of each unit
    ("reconstruction"), its :attr:`notices` what stays in floating point and why.

    Processes that torch.distributed has joined, and that call this with the same, share the calls and the work: each
    gets the result, the first one alone samples the calls and keeps files, and what one raises all raise; where one
    raises an error that is not of this package (of ``on_unit``), others raise :class:`~ptq_tdq.errors.WorkerError`.

    Raises before the first unit: :class:`~ptq_tdq.errors.ModelError` (no time argument, 0 layers),
    :class:`~ptq_tdq.errors.CalibrationSetError` for calls that do not fit the model,
    :class:`~ptq_tdq.errors.ConfigError` for what an artifact cannot say (a ``model_id`` that is no text), and for
    ``component``, ``prompts``, ``classes`` or ``call`` where they would have no effect,
    :class:`~ptq_tdq.errors.ResumeError` (another run in the directory); at any time
    :class:`~ptq_tdq.errors.NonFiniteError` (NaN or Inf; names the layer and t).
    """
    if not isinstance(config, Config):
        raise ConfigError(f"config must be what ptq_tdq.preset gives. Got a {type(config).__name__} instead.")
    if not isinstance(calls, Calls | None):
        raise CalibrationSetError(f"calls must be what ptq_tdq.record gives. Got a {type(calls).__name__} instead.")
    sampled: dict[str, Any] = {"prompts": prompts, "classes": classes, "call": call}
    original = find_original(model, recorded=calls is not None, component=component, **sampled)
    calls = _calls_of(original, config, calls)
    plan = _plan_of(original.denoiser, config, calls)
    folded = folded_copy(original.denoiser)
    exchanged, settings = beside_configuration(folded, calls.axis.argument)
    quantized = QuantizedModel(folded, calls.axis, plan.layers)
    quantized.provenance = provenance(original, config, calls, model_id)
    quantized.provenance |= {"one_step": bool(plan.special.single), "buffer_dtypes": buffer_dtypes(quantized.model)}
    quantized.provenance |= {"exchanged_modules": exchanged}
    said = (_training(original.denoiser), _close_steps(calls), _exchanged(exchanged), _changed(settings))
    quantized.notices = (*plan.notices, *chain.from_iterable(said))
    check_draft(quantized.provenance, [record.to_dict() for record in plan.layers])
    folders = {"run_directory": run_directory is not None, "weights_directory": weights_directory is not None}
    processes.check_alike(lambda: identity(quantized.provenance) | folders)
    run = _open_run(run_directory, weights_directory, config, quantized.provenance, on_notice)
    reports: list[UnitReport] = []

    def finished(report: UnitReport) -> None:
        reports.append(report)
        on_unit(report)

    quantized.static = reconstruct(
        quantized,
        calls,
        config,
        special=plan.special,
        run=run,
        budget=cache_budget,
        on_unit=finished,
    )
    quantized.metrics = {
        "reconstruction": losses(reports),
        "coverage": plan.coverage,
        "mean_bits": {"weights": plan.weight_bits, "activations": plan.activation_bits},
        "notices": list(quantized.notices),
    }
    return quantized.finalize()


def _calls_of(original: Original, config: Config, calls: Calls | None) -> Calls:
    """The calibration set where the model is: the ``calls`` that there are, else those that the model samples."""
    if calls is None:
        assert isinstance(original, LoadedModel)
        calls = processes.of_first(partial(collect, original, **config.recipe))
    calls.check()
    return calls.to(next(original.denoiser.parameters()).device)


def _plan_of(denoiser: nn.Module, config: Config, calls: Calls) -> Plan:
    folded = folded_copy(denoiser)  # for as long as it is needed: weights that it has computed take memory
    plan = make_plan(folded, config, calls)
    if name := first_nonfinite(folded):  # also one that no call of the set reaches
        raise NonFiniteError(f"'{name}' has NaN or Inf; repair the model before quantizing it.")
    return plan


def foresee(
    model: LoadedModel, config: Config, *, cache_budget: int = CACHE_BYTES, evaluation_samples: int = 0
) -> Forecast:
    """What :func:`calibrate` will take, before there is a calibration set, at the price of a few calls.

    With ``evaluation_samples`` also what it takes to compare so many with full precision's. One of several processes
    may call this for all of them, while they wait.

    Raises what it would for choices that do not fit ``model``.
    """
    count = processes.count()
    with processes.apart():
        return _foresee(model, config, cache_budget, evaluation_samples, count)


def _foresee(model: LoadedModel, config: Config, budget: int, evaluation_samples: int, count: int) -> Forecast:
    call = first_call(model, config.calibration.num_inference_steps, config.seed)
    plan = make_plan(folded_copy(model.denoiser), config, call)
    quantized = QuantizedModel.copy_of(model.denoiser, call.axis, plan.layers)
    samples, steps = config.calibration.samples_per_step * len(call), config.calibration.calibration_steps
    trajectories = samples * min(config.calibration.thinning, steps)
    return make_forecast(
        quantized,
        call,
        config,
        rows=samples * steps,
        sampled=trajectories * config.calibration.num_inference_steps,
        budget=budget,
        measured=evaluation_samples * config.calibration.num_inference_steps,
        processes=count,
        here=min(count, launch.here()),
    )


def _training(model: nn.Module) -> Iterator[str]:
    """A sentence where the model is in training mode, and does not compute there what its quantized copy does."""
    names = [name for name, module in model.named_modules() if module.training and _trains(module)]
    if names:
        yield (
            f"The model is in training mode, in which '{names[0]}' computes something else than its quantized copy; "
            "call eval() before its calls are recorded."
        )


def _trains(module: nn.Module) -> bool:
    """Whether a module of torch computes something of its own in training mode."""
    if isinstance(module, _NormBase):
        return bool(module.track_running_stats)
    if isinstance(module, nn.MultiheadAttention):
        return bool(module.dropout)
    return isinstance(module, nn.RReLU) or (isinstance(module, DROPOUT) and bool(module.p))


def _close_steps(calls: Calls) -> Iterator[str]:
    """A sentence where there is one step, or many share entries of the tables, which are evenly spaced over time."""
    t = calls.t.unique()
    if len(t) == 1:
        yield (
            f"All recorded calls are at one time step (t = {t.item():g}), so nothing is known of others; a sampler "
            f"that makes several should give each its own {calls.axis.argument}."
        )
    shared = len(t) - len(t.round().unique())
    if shared > len(t) // 4:
        yield (
            f"{shared} of {len(t)} steps lie so close together on the time axis that they share entries of the tables "
            f"with others; if {calls.axis.argument} is a noise level over decades, call the model with its logarithm."
        )


def _exchanged(modules: Mapping[str, str | None]) -> Iterator[str]:
    """A sentence where the configuration that an artifact holds builds another model than the one calibrated."""
    for name, cls in [*modules.items()][:1]:
        first = f"is of class {cls}" if cls else "is missing"
        yield (
            f"Modules that are not those that the model's configuration builds: {len(modules)} ('{name}' {first}); its "
            "artifact is loaded with a model that is changed so, as model=..."
        )


def _changed(settings: Mapping[str, Any]) -> Iterator[str]:
    """A sentence where modules have settings that the configuration of an artifact does not hold."""
    for name, value in [*settings.items()][:1]:
        yield (
            f"Settings that the model's configuration does not hold: {len(settings)} ('{name}' is {value!r}); "
            "give them to the loaded model again, or load the artifact with a model that has them, as model=..."
        )


def _open_run(
    folder: str | Path | None,
    weights: str | Path | None,
    config: Config,
    document: dict[str, Any],
    on_notice: Callable[[str], None],
) -> RunDirectory | None:
    if folder is None:
        return None
    shared = RunDirectory(weights, weight_identity(document, config), on_notice=on_notice) if weights else None
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


def provenance(model: Original, config: Config, calls: Calls, model_id: str | None = None) -> dict[str, Any]:
    """The artifact's config document: what the quantized model was made from, and with which choices."""
    base = {"id": model_id or written_id(model.id), "sha256": model.sha256}
    base |= {} if model.component is None else {"component": model.component}
    return {
        "base_model": base,
        "model_config": base_config(model.denoiser),
        "scheme": config.scheme,
        "method": config.method,
        "preset": config.preset,
        "choices": config.to_dict(),
        "time_axis": calls.axis.to_dict(),
        "calibration_set": {"sha256": calls.sha256, "rows": len(calls), **calls.recipe},
        "seed": config.seed,
        "versions": {name: version(name) for name in ("ptq-tdq", "torch", "diffusers", "numpy", "scipy", "safetensors")}
        | {"python": platform.python_version()},
    }


def written_id(name: str) -> str:
    """A model's name in an artifact: a folder that could be taken for a hub id is written as the folder that it is.

    Raises :class:`ConfigError` for a name that an artifact cannot hold.
    """
    try:
        name.encode()
    except UnicodeEncodeError:
        raise ConfigError("The name of the model's folder is not UTF-8; rename it.") from None
    looks_like_a_hub_id = not name.startswith((".", "~", "/")) and Path(name).is_dir()
    return f"./{name}" if looks_like_a_hub_id else name


def identity(document: dict[str, Any]) -> dict[str, Any]:
    """What must not change between two sittings of one run, by key; causes come before what follows from them."""
    return {
        "form of its files": CHECKPOINT_FORM,
        "model": document["base_model"]["sha256"],
        **{f"choice {key}": value for key, value in ungrouped(document["choices"]).items()},
        "calibration_set": document["calibration_set"]["sha256"],
        "threads": torch.get_num_threads(),  # the order of sums, and so the bytes, depend on it
        **{f"version of {key}": value for key, value in document["versions"].items()},
    }


def weight_identity(document: dict[str, Any], config: Config) -> dict[str, Any]:
    """The part of :func:`identity` that phase W depends on."""
    found = {key: value for key, value in identity(document).items() if not key.startswith("choice ")}
    return found | {f"choice {key}": value for key, value in config.weight_choices.items()}
