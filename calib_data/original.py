"""What a user gives as the full-precision model: a pipeline, a model that is loaded, or any module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ptq_tdq.calib_data.embedded import find_embedded
from ptq_tdq.calib_data.pipeline import PipelineSampler
from ptq_tdq.calib_data.sampler import Sampler
from ptq_tdq.compiled import uncompiled
from ptq_tdq.errors import CalibrationSetError, ConfigError, ModelError, NonFiniteError
from ptq_tdq.identity import dtype_name, first_nonfinite, model_name, model_sha256
from ptq_tdq.modules import QuantLayer
from ptq_tdq.structure import diffusers_class
from ptq_tdq.timeaxis import time_argument
from ptq_tdq.timed_model import TimedModel

COMPUTED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # dtypes of weights that layers compute with


@dataclass(frozen=True, eq=False)
class Original:
    """A full-precision model, of which calls are recorded.

    ``component`` is the denoiser's name in its pipeline (None for a bare one). ``sha256`` covers its weights (as
    float32) and its configuration.
    """

    denoiser: Any  # a module of diffusers, or any with its call signature
    id: str
    sha256: str
    component: str | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class LoadedModel(Original):
    """A full-precision model, ready to sample.

    ``denoiser`` has `config`, `device` and `dtype` as diffusers' own have; of :func:`load_model` it is in evaluation
    mode and without gradients. ``notices`` are sentences that the user should see.
    """

    sampler: Sampler
    notices: tuple[str, ...] = ()

    @property
    def scheduler(self) -> Any:
        return self.sampler.scheduler


def from_pipeline(
    pipe: Any,
    *,
    component: str | None = None,
    prompts: str | Sequence[str] | None = None,
    classes: Sequence[int] | None = None,
    call: Mapping[str, Any] | None = None,
) -> LoadedModel:
    """A pipeline of diffusers that is already in memory; the arguments are those of :func:`load_model`."""
    found = _find_denoiser(pipe, component)
    sampler = PipelineSampler(pipe, str(found.component), prompts, classes, call)
    return LoadedModel(**vars(found), sampler=sampler)


def find_original(
    model: Any,
    *,
    recorded: bool,
    component: str | None = None,
    prompts: str | Sequence[str] | None = None,
    classes: Sequence[int] | None = None,
    call: Mapping[str, Any] | None = None,
) -> Original:
    """What a user gives as the full-precision model: a pipeline, what :func:`load_model` gives, or any module.

    ``recorded`` says whether there are data already; without them it is a :class:`LoadedModel`. The other arguments are
    those of :func:`load_model`. Raises :class:`ConfigError` for one of them that would have no effect,
    :class:`CalibrationSetError` for a module that nothing was recorded of, and as :func:`load_model` does.
    """
    sampled: dict[str, Any] = {"prompts": prompts, "classes": classes, "call": call}
    if isinstance(model, LoadedModel):
        _refuse({"component": component, **sampled}, "the model is loaded already; give them to load_model.")
        check_denoiser(model.denoiser)  # it may have changed since
        return model
    if recorded:
        _refuse(sampled, "nothing is sampled, since there are data already; leave them out.")
    if not isinstance(model, nn.Module):
        return _find_denoiser(model, component) if recorded else from_pipeline(model, component=component, **sampled)
    _refuse({"component": component, **sampled}, "they are a pipeline's; leave them out, or pass the model's pipeline.")
    if not recorded:
        raise CalibrationSetError(
            f"{type(model).__name__} alone does not say how it is sampled; record calls of it (ptq_tdq.record) and "
            "pass them, or pass its pipeline."
        )
    _check_plain(model)  # the rest depends on the calls
    return Original(model, model_name(model), model_sha256(model))


def _refuse(given: Mapping[str, Any], why: str) -> None:
    named = [name for name, value in given.items() if value is not None]
    if named:
        raise ConfigError(f"{', '.join(named)} would have no effect: {why}")


def _find_denoiser(pipe: Any, component: str | None) -> Original:
    if not hasattr(pipe, "components"):
        raise ModelError(f"{type(pipe).__name__} is no pipeline and no module; load_model() reads folders.")
    components = {name: uncompiled(value) for name, value in pipe.components.items()}
    quantized = [name for name, value in components.items() if isinstance(value, TimedModel)]
    known = [
        name
        for name, value in components.items()
        if isinstance(value, nn.Module) and diffusers_class(type(value).__name__) and _takes_time(value)
    ]
    if component in quantized or (component is None and quantized and not known):
        name = component or quantized[0]
        raise ModelError(f"The {name} is quantized already; calibrate the full-precision one.")
    if component is None and len(known) != 1:
        found = f"several denoisers ({', '.join(known)})" if known else "no component that is known to be a denoiser"
        raise ModelError(f"{type(pipe).__name__} has {found}; name one as component=...")
    name = component or known[0]
    denoiser = uncompiled(getattr(pipe, name, None))
    if not isinstance(denoiser, nn.Module):
        raise ModelError(f"{type(pipe).__name__} has no denoiser named {name!r}; it has {', '.join(known)}.")
    check_denoiser(denoiser)
    source = getattr(pipe, "config", {}).get("_name_or_path") or model_name(denoiser)
    return Original(denoiser, str(source), model_sha256(denoiser), name)


def check_denoiser(model: nn.Module) -> None:
    """Check that a model can be quantized over time.

    Raises :class:`ModelError` when its ``forward`` has no time argument, when it is quantized, has adapters beside its
    layers, hooks of diffusers or no parameters, or weights that nothing can be computed with; :class:`NonFiniteError`
    naming the layer for NaN or Inf in a weight.
    """
    time_argument(model)
    _check_plain(model)
    if name := first_nonfinite(model):
        raise NonFiniteError(f"The weight '{name}' has NaN or Inf; the model cannot be quantized, load another copy.")


def _check_plain(model: nn.Module) -> None:
    if isinstance(model, TimedModel) or any(isinstance(module, QuantLayer) for module in model.modules()):
        raise ModelError("The model is quantized already; give the full-precision one.")
    if getattr(model, "peft_config", None):
        raise ModelError(
            "The model has adapters that are not part of it; fuse them first (pipe.fuse_lora(), "
            "pipe.unload_lora_weights()), or load them onto the quantized model."
        )
    registries = [getattr(module, "_diffusers_hook", None) for module in model.modules()]
    if hooks := [hook for registry in registries for hook in getattr(registry, "hooks", ())]:
        raise ModelError(
            f"The model has hooks of diffusers ('{hooks[0]}'): what caches, casts or offloads comes after calibration. "
            "Take them off (disable_cache(), or load the model again), and enable them on the quantized model."
        )
    if next(model.parameters(), None) is None:
        raise ModelError("The model has no parameters: nothing would be quantized.")
    for name, x in model.named_parameters():
        if x.is_meta:
            raise ModelError(
                f"'{name}' of the model has no values here; load them, or calibrate before weights are offloaded "
                "(pipe.remove_all_hooks())."
            )
        if type(x.data.cpu()) is not Tensor:  # torchao's, and what fully_shard makes
            raise ModelError(
                f"'{name}' of the model is a {type(x.data).__name__}, a tensor that is quantized already, or in parts; "
                "pass a model of plain tensors."
            )
        if x.is_floating_point() and x.dtype not in COMPUTED:
            raise ModelError(
                f"'{name}' of the model is {dtype_name(x.dtype)}, in which nothing is computed; load it in another "
                "dtype."
            )


def is_embedded(model: LoadedModel) -> bool:
    """Whether the model comes with the package, and so samples images that the embedded classifiers know."""
    return find_embedded(model.id) is not None


def _takes_time(model: nn.Module) -> bool:
    try:
        time_argument(model)
    except ModelError:
        return False
    return True
