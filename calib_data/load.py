"""Load a full-precision model from files, with all that sampling needs: its pipeline, or scheduler, around it."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import nn

from ptq_tdq.artifacts import CONFIG_FILE
from ptq_tdq.calib_data.embedded import EMBEDDED, find_embedded
from ptq_tdq.calib_data.loop import LoopSampler
from ptq_tdq.calib_data.original import LoadedModel, check_denoiser
from ptq_tdq.calib_data.pipeline import PipelineSampler, find_condition
from ptq_tdq.calib_data.reference import NO_CLASS, reference_path
from ptq_tdq.calib_data.sampler import Sampler
from ptq_tdq.calib_data.source import Parts, find_folder, find_parts, read_config
from ptq_tdq.errors import ConfigError, ModelError, PtqTdqError, first_line
from ptq_tdq.files import check_tensors
from ptq_tdq.identity import model_sha256
from ptq_tdq.processor import check_device
from ptq_tdq.structure import TensorCounts, asks_too_much, diffusers_class
from ptq_tdq.timeaxis import LONGEST

_VARIANT = re.compile(r"[^.]+\.([^.]+?)(?:-\d+-of-\d+)?\.safetensors")
_ACCELERATE = find_spec("accelerate") is not None  # loads in less memory; some models are loaded in no other way


def load_model(
    source: str | None = None,
    *,
    component: str | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    prompts: str | Sequence[str] | None = None,
    classes: Sequence[int] | None = None,
    call: Mapping[str, Any] | None = None,
) -> LoadedModel:
    """Load an embedded model (:data:`EMBEDDED`; "reference" is the default), a local diffusers folder or a hub id.

    A folder holds a pipeline, or a bare denoiser whose scheduler may be in it or beside it. ``component`` names the
    denoiser of a pipeline that has several. What is sampled, for calibration and evaluation, are ``prompts`` (or one
    alone, a str) or ``classes``; ``call`` are further arguments of the pipeline (guidance_scale, height, width, ...).

    Raises :class:`ModelError` for a source that does not exist, cannot be reached, is damaged, quantized already or has
    no denoiser, :class:`NonFiniteError` naming the layer for NaN or Inf in a weight, and :class:`ConfigError` for an
    unknown device and for prompts, classes or arguments that the model does not take.
    """
    check_device(device)
    source = "reference" if source is None else source
    name = EMBEDDED[source].id if source in EMBEDDED else source
    embedded = find_embedded(name)
    folder = embedded.folder if embedded else find_folder(name)
    if (folder / CONFIG_FILE).is_file():
        raise ModelError(f"'{folder}' is an artifact, a model that is quantized already; give the full-precision one.")
    parts = find_parts(folder, component)
    with _quiet():
        denoiser = _load_weights(_class_of(parts.denoiser), parts.denoiser)
        check_denoiser(denoiser)
        sampler, notices = _make_sampler(parts, denoiser, prompts, classes, call)
    sha256 = model_sha256(denoiser)
    try:
        with _quiet():
            _move(denoiser, sampler, torch.device(device), dtype)
    except RuntimeError as error:  # too little memory, a dtype that it does not have
        raise ConfigError(f"The device '{device}' cannot be used here ({error}); choose another.") from error
    return LoadedModel(denoiser, name, sha256, parts.component, sampler=sampler, notices=notices)


def with_scheduler(model: LoadedModel, name: str) -> LoadedModel:
    """Return the model with another diffusers scheduler, of the class ``name``, on the model's own noise schedule.

    Raises :class:`ConfigError` for a class that diffusers does not have or that cannot be made from this schedule.
    """
    cls = diffusers_class(name, "SchedulerMixin")
    if not hasattr(cls, "from_config"):
        raise ConfigError(
            f"diffusers has no scheduler named {name!r}, or lacks a package for it; "
            "try DDIMScheduler or EulerDiscreteScheduler."
        )
    what = f"{name} cannot be made from the model's own schedule"
    with _refusing(ConfigError, what, "try another, or save the pipeline with that scheduler and load it"), _quiet():
        sampler = copy.copy(model.sampler)
        sampler.scheduler = cls.from_config(model.scheduler.config)
        if hasattr(sampler.scheduler, "alphas_cumprod") != hasattr(model.scheduler, "alphas_cumprod"):
            raise ValueError("their noise schedules are of different kinds")
    return replace(model, sampler=sampler)


def _make_sampler(
    parts: Parts,
    denoiser: nn.Module,
    prompts: Sequence[str] | None,
    classes: Sequence[int] | None,
    call: Mapping[str, Any] | None,
) -> tuple[Sampler, tuple[str, ...]]:
    """The pipeline where it does more than the plain loop: where there is something to tell it."""
    if parts.scheduler is not None:
        _check_length(parts.scheduler)
    if parts.pipeline is not None and parts.component is not None:
        pipe = _load_pipeline(parts.pipeline, parts.component, denoiser)
        others = set(pipe.components) - {parts.component, "scheduler", "vae", "vqvae"}
        if others or find_condition(pipe, parts.component)[0] is not None:
            return PipelineSampler(pipe, parts.component, prompts, classes, call), ()
    if prompts is not None or set(call or {}) - {"eta"}:
        raise ConfigError(
            f"'{parts.denoiser}' is no pipeline with a condition: it takes no prompts and no arguments such as "
            "guidance_scale, height or width, only eta."
        )
    embedded = find_embedded(str(parts.denoiser.parent))
    vae = parts.vae or (embedded.vae if embedded else None)
    loaded = None if vae is None else _load_weights(_class_of(vae), vae)
    scheduler, notices = _load_scheduler(parts)
    # the last embedding of the embedded U-Net means "no class"
    count = NO_CLASS if parts.denoiser.parent.resolve() == reference_path().resolve() else None
    return LoopSampler(denoiser, scheduler, loaded, classes, count, **(call or {})), notices


def _load_pipeline(folder: Path, component: str, denoiser: nn.Module) -> Any:
    index = read_config(folder / "model_index.json")
    named = [cls[0] for cls in index.values() if isinstance(cls, list) and cls]
    if own := [file.name for pattern in ("*.py", "*/*.py") for file in folder.glob(pattern) if file.stem in named]:
        raise ModelError(
            f"The pipeline in '{folder}' has code of its own ({own[0]}), which is never run from here; load it in "
            "Python (DiffusionPipeline.from_pretrained(..., trust_remote_code=True)) and give it to ptq_tdq.calibrate."
        )
    # what a safety checker would do to the pictures of an untrained or quantized model is no loss of quantization
    given = {"safety_checker": None} if "safety_checker" in index else {}
    advice = (
        "its files are missing or damaged, or a package that they need is not installed "
        "(pip install 'ptq-tdq[pipelines]')"
    )
    with _refusing(ModelError, f"The pipeline in '{folder}' cannot be loaded", advice), _quiet("transformers"):
        from diffusers import DiffusionPipeline

        return DiffusionPipeline.from_pretrained(
            folder,
            torch_dtype=torch.float32,
            low_cpu_mem_usage=_ACCELERATE,
            local_files_only=True,
            use_safetensors=True,
            variant=next(filter(None, map(_variant, folder.glob("*/"))), None),
            **{component: denoiser, **given},
        )


def _load_weights(cls: Any, folder: Path) -> Any:
    if not any(folder.glob("*.safetensors")):
        pickled = next((f.name for kind in ("*.bin", "*.ckpt", "*.pt") for f in folder.glob(kind)), None)
        if pickled:
            raise ModelError(
                f"The weights in '{folder}' are pickled ({pickled}), which can run code and is never read; "
                "save the model with safetensors."
            )
    advice = "its files are missing, truncated or of another model, so copy or download them again"
    with _refusing(ModelError, f"The {cls.__name__} in '{folder}' cannot be loaded", advice):
        held = _headers(folder)
        counts = TensorCounts(len(held), sum(values for _, values in held.values()))
        if held and asks_too_much(cls, read_config(folder / "config.json"), counts):
            raise ValueError("its configuration asks for a far larger model than its weights are")
        model, info = cls.from_pretrained(
            folder,
            torch_dtype=torch.float32,
            low_cpu_mem_usage=_ACCELERATE,
            local_files_only=True,
            use_safetensors=True,
            variant=_variant(folder),
            output_loading_info=True,
        )
    for problem in ("missing_keys", "unexpected_keys"):
        if info[problem]:
            what = problem.removesuffix("_keys")
            raise ModelError(
                f"The weights in '{folder}' do not fit its configuration ({what}: {sorted(info[problem])[0]}); "
                "copy or download the folder again."
            )
    for name, parameter in model.named_parameters():  # diffusers would take codes for weights
        kind, _ = held.get(name, ("", 0))
        if parameter.is_floating_point() and kind.startswith(("I", "U", "BOOL")):
            raise ModelError(
                f"'{name}' in '{folder}' is {kind}, which is no type of weights; save it in floating point."
            )
    return model.eval().requires_grad_(False)


def _variant(folder: Path) -> str | None:
    """What the weights in ``folder`` are a variant of ("fp16"), where there are no others."""
    found = [_VARIANT.fullmatch(file.name) for file in folder.glob("*.safetensors")]
    return next((name[1] for name in found if name), None) if all(found) else None


def _headers(folder: Path) -> dict[str, tuple[str, int]]:
    """The type and the number of values of each tensor that a folder's weights hold, before anything is read."""
    found = dict[str, tuple[str, int]]()
    for path in folder.glob("*.safetensors"):
        check_tensors(path)
        with safe_open(path, framework="pt") as opened:
            parts = ((name, opened.get_slice(name)) for name in opened.keys())  # noqa: SIM118 (not a dict)
            found |= {name: (part.get_dtype(), prod(part.get_shape())) for name, part in parts}
    return found


def _class_of(folder: Path) -> Any:
    config = read_config(folder / "config.json")
    if config.get("quantization_config"):
        raise ModelError(f"The model in '{folder}' is quantized already; give the full-precision one.")
    return _known_class(config, folder)


def _known_class(
    config: Mapping[str, Any], folder: Path, base: Literal["ModelMixin", "SchedulerMixin"] = "ModelMixin"
) -> Any:
    name = config.get("_class_name")
    cls = diffusers_class(name, base)
    if cls is None:
        raise ModelError(
            f"The configuration in '{folder}' names the class {name!r}, which this diffusers does not have."
        )
    return cls


def _load_scheduler(parts: Parts) -> tuple[Any, tuple[str, ...]]:
    if parts.scheduler is None:
        notice = f"'{parts.denoiser}' has no scheduler_config.json; using DDPMScheduler with its defaults."
        from diffusers import DDPMScheduler

        return DDPMScheduler(), (notice,)
    config = read_config(parts.scheduler / "scheduler_config.json")
    cls = _known_class(config, parts.scheduler, "SchedulerMixin")
    with _refusing(ModelError, f"The scheduler in '{parts.scheduler}' cannot be made", "correct its file"):
        return cls.from_config(config), ()


def _check_length(scheduler: Path) -> None:
    """Refuse a schedule that no table covers: it would take memory and minutes first."""
    steps = read_config(scheduler / "scheduler_config.json").get("num_train_timesteps")
    if isinstance(steps, int | float) and steps > LONGEST:
        raise ModelError(
            f"The scheduler in '{scheduler}' has {steps:,} training steps, more than the {LONGEST:,} that interval "
            "tables may have; correct its file."
        )


@contextmanager
def _refusing(kind: type[PtqTdqError], what: str, advice: str) -> Iterator[None]:
    """Around what other libraries make of files, who raise errors of any type: one sentence of ours in their place."""
    try:
        yield
    except Exception as error:
        raise kind(f"{what} ({first_line(error)}); {advice}.") from error


def _move(denoiser: nn.Module, sampler: Sampler, device: torch.device, dtype: torch.dtype) -> None:
    denoiser.to(device, dtype)
    if isinstance(sampler, PipelineSampler):
        sampler.pipe.to(device, dtype)
    elif isinstance(sampler, LoopSampler) and sampler.vae is not None:
        sampler.vae.to(device, dtype)


@contextmanager
def _quiet(name: Literal["diffusers", "transformers"] = "diffusers") -> Iterator[None]:
    """Silence log lines and bars about things that :func:`load_model` reports itself, as errors with an advice.

    Nothing happens where the library is not installed: text encoders need transformers, not every model has one.
    """
    if find_spec(name) is None:
        yield
        return
    library = import_module(f"{name}.utils.logging")
    verbosity, bar = library.get_verbosity(), library.is_progress_bar_enabled()
    library.set_verbosity_error()
    library.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of names that change between the versions that we support
            yield
    finally:
        library.set_verbosity(verbosity)
        if bar:
            library.enable_progress_bar()
