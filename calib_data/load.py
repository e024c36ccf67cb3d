"""Load a diffusion model with all that sampling needs: U-Net, scheduler and, for latent models, VAE."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DDPMScheduler, ModelMixin, SchedulerMixin
from diffusers.utils import logging as diffusers_logging
from torch import nn

from ptq_tdq.calib_data.reference import NO_CLASS, reference_path
from ptq_tdq.calib_data.source import Components, find_components, find_folder, read_config
from ptq_tdq.errors import ConfigError, ModelError, NonFiniteError
from ptq_tdq.timed_model import require_timestep

REFERENCE_ID = "ptq-tdq/reference-cifar10-ldm"


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A full-precision model, ready to sample.

    ``unet`` is in evaluation mode and without gradients; ``vae`` is None for models in pixel space. ``sha256`` covers
    the U-Net's float32 weights and its configuration. ``num_classes`` counts the real classes, 0 for an unconditional
    model; a label for "no class" is not one of them. ``notices`` are sentences that the user should see.
    """

    unet: Any  # diffusers.UNet2DModel, or any module with its call signature, `config`, `device` and `dtype`
    scheduler: Any  # any diffusers scheduler
    vae: Any | None
    id: str
    sha256: str
    num_classes: int = 0
    notices: tuple[str, ...] = ()


def load_model(
    source: str | None = None, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> LoadedModel:
    """Load the embedded reference model (``source`` None), a local diffusers folder or a hub id.

    A local folder is a pipeline (U-Net and scheduler in sub-folders, or at its top level as in google/ddpm-cifar10-32)
    or a bare UNet2DModel folder, whose scheduler may be in it or beside it.

    Raises :class:`ModelError` for a source that does not exist, cannot be reached, is damaged or is no UNet2DModel,
    :class:`NonFiniteError` naming the layer for NaN or Inf in a weight, and :class:`ConfigError` for an unknown device.
    """
    folder = reference_path() if source is None else find_folder(source)
    parts = find_components(folder)
    with _quiet_diffusers():
        unet = _load_weights(diffusers.UNet2DModel, parts.unet)
        vae = None if parts.vae is None else _load_weights(_vae_class(parts.vae), parts.vae)
        scheduler, notices = _load_scheduler(parts)
    check_unet(unet)
    sha256 = unet_sha256(unet)
    classes = int(unet.config.num_class_embeds or 0)
    if classes and folder.resolve() == reference_path().resolve():
        classes = NO_CLASS
    try:
        with _quiet_diffusers():
            unet.to(device, dtype)
            vae = None if vae is None else vae.to(device, dtype)
    except (RuntimeError, AssertionError) as error:  # torch reports a missing backend as either
        raise ConfigError(f"The device '{device}' cannot be used here ({error}); choose another.") from error
    return LoadedModel(unet, scheduler, vae, source or REFERENCE_ID, sha256, classes, notices)


def with_scheduler(model: LoadedModel, name: str) -> LoadedModel:
    """Return the model with another diffusers scheduler, of the class ``name``, on the model's own noise schedule.

    Raises :class:`ConfigError` for a class that diffusers does not have or that cannot be made from this schedule.
    """
    cls = getattr(diffusers, name, None) if name.isidentifier() else None
    if not (isinstance(cls, type) and issubclass(cls, SchedulerMixin)):
        raise ConfigError(
            f"diffusers has no scheduler named {name!r}, or lacks a package for it; "
            "try DDIMScheduler or EulerDiscreteScheduler."
        )
    try:
        with _quiet_diffusers():
            return replace(model, scheduler=cls.from_config(model.scheduler.config))
    except (ImportError, NotImplementedError, TypeError, ValueError) as error:
        raise ConfigError(f"{name} cannot be made from the model's own schedule ({error}); try another.") from error


def check_unet(unet: nn.Module) -> None:
    """Check that a U-Net can be quantized over time.

    Raises :class:`ModelError` when its ``forward`` has no ``timestep`` argument or its classes are not integer labels,
    and :class:`NonFiniteError` naming the layer for NaN or Inf in a weight.
    """
    require_timestep(unet)
    class_embedding = getattr(getattr(unet, "config", None), "class_embed_type", None)
    if class_embedding is not None:
        raise ModelError(
            f"Class embeddings of type '{class_embedding}' are not supported; pass a model with integer class labels "
            "(num_class_embeds) or without classes."
        )
    for name, tensor in unet.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise NonFiniteError(
                f"The weight '{name}' has NaN or Inf; the model cannot be quantized, load another copy."
            )


def unet_sha256(unet: Any) -> str:
    """Hash the weights (as float32) and the configuration of a U-Net.

    Configuration entries at their default are left out, so a newer diffusers with more entries gives the same hash.
    """
    defaults = inspect.signature(type(unet).__init__).parameters
    config = {
        name: value
        for name, value in dict(unet.config).items()
        if not name.startswith("_") and not (name in defaults and _same(value, defaults[name].default))
    }
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(unet.state_dict().items()):
        values = (tensor.float() if tensor.is_floating_point() else tensor).detach().cpu().contiguous()
        digest.update(f"{name} {values.dtype} {list(values.shape)}".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()


def _same(value: Any, default: Any) -> bool:
    return list(value) == list(default) if isinstance(default, tuple) and value is not None else bool(value == default)


def _load_weights(cls: Any, folder: Path) -> Any:
    has_safetensors = any(folder.glob("*.safetensors"))
    try:
        model, info = cls.from_pretrained(
            folder,
            torch_dtype=torch.float32,
            low_cpu_mem_usage=False,  # True needs the accelerate package
            local_files_only=True,
            use_safetensors=has_safetensors,
            output_loading_info=True,
        )
    except (OSError, RuntimeError, ValueError, TypeError, KeyError) as error:
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise ModelError(
            f"The {cls.__name__} in '{folder}' cannot be loaded ({reason}); "
            "its files are missing, truncated or of another model, so copy or download them again."
        ) from error
    for problem in ("missing_keys", "unexpected_keys"):
        if info[problem]:
            what = problem.removesuffix("_keys")
            raise ModelError(
                f"The weights in '{folder}' do not fit its configuration ({what}: {sorted(info[problem])[0]}); "
                "copy or download the folder again."
            )
    return model.eval().requires_grad_(False)


def _vae_class(folder: Path) -> Any:
    return _diffusers_class(read_config(folder / "config.json").get("_class_name"), ModelMixin, folder)


def _load_scheduler(parts: Components) -> tuple[Any, tuple[str, ...]]:
    if parts.scheduler is None:
        notice = f"'{parts.unet}' has no scheduler_config.json; using DDPMScheduler with its defaults."
        return DDPMScheduler(), (notice,)
    config = read_config(parts.scheduler / "scheduler_config.json")
    cls = _diffusers_class(config.get("_class_name"), SchedulerMixin, parts.scheduler)
    try:
        return cls.from_config(config), ()
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ModelError(f"The scheduler in '{parts.scheduler}' cannot be made ({error}); correct its file.") from error


def _diffusers_class(name: Any, base: type, folder: Path) -> Any:
    cls = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise ModelError(
            f"The configuration in '{folder}' names the class {name!r}, which this diffusers does not have."
        )
    return cls


@contextmanager
def _quiet_diffusers() -> Iterator[None]:
    """Silence log lines about things that :func:`load_model` reports itself, as errors with an advice."""
    before = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(before)
