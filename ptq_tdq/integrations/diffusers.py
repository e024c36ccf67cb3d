"""Quantized denoisers as components of diffusers' pipelines: importing this file makes diffusers know them.

A pipeline that was saved with one loads by ``DiffusionPipeline.from_pretrained``, and is saved again by
``save_pretrained``::

    import ptq_tdq.integrations.diffusers

    pipe = DiffusionPipeline.from_pretrained("folder")

Such a component is a folder of diffusers: ``config.json`` holds, under ``quantization_config``, what
``ptq_tdq_config.json`` holds of an artifact, and the weights file all tensors of the artifact, packed. Diffusers' own
loader would cast them, so it gets none to load: the whole artifact is checked and put into the model beforehand.
"""

from __future__ import annotations

import os
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from enum import StrEnum
from functools import cache, wraps
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ptq_tdq.artifacts import Artifact, component_document, component_tensors, decode_component
from ptq_tdq.atomic import publish_directory
from ptq_tdq.errors import ArtifactCorruptError, ConfigError, MissingExtraError, ModelError
from ptq_tdq.identity import base_config, dtype_name
from ptq_tdq.load import Given, as_artifact, build_quantized, find_artifact
from ptq_tdq.modules import QuantLayer
from ptq_tdq.modules.products import called_by
from ptq_tdq.quantized_model import QuantizedModel
from ptq_tdq.structure import building, check_built
from ptq_tdq.timed_model import ADAPTERS, TimedModel, checkpoint_in_call
from ptq_tdq.wrap import fold

__all__ = ["PtqTdqConfig", "as_diffusers"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class Method(StrEnum):
    """The name under which diffusers finds this file."""

    PTQ_TDQ = "ptq-tdq"


if not hasattr(DiffusersQuantizer, "maybe_update_loaded_keys"):
    raise MissingExtraError("Pipelines with quantized components need diffusers 0.40 or newer; upgrade diffusers.")


class PtqTdqConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """Which artifact's quantized model takes the place of a component that is loaded in full precision.

    ``artifact`` is a folder or a hub id. The pipeline gives the structure; all weights are those of the artifact::

        config = PipelineQuantizationConfig(quant_mapping={"unet": PtqTdqConfig("out")})
        pipe = DiffusionPipeline.from_pretrained(folder, quantization_config=config)

    A component that is saved with its quantization needs none of this.
    """

    def __init__(self, artifact: str | Path | None = None, *, document: dict[str, Any] | None = None) -> None:
        self.quant_method = Method.PTQ_TDQ
        self.artifact, self.document = artifact, document

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """From a component's ``config.json``; what a file says of other places is not followed."""
        config = cls(document=config_dict.get("document"))
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": self.quant_method.value, "document": self.document}

    def to_diff_dict(self) -> dict[str, Any]:
        """What a print shows: how the model was quantized, not each of its layers."""
        shown = ("scheme", "method", "preset", "base_model")
        return {"quant_method": self.quant_method.value} | {key: (self.document or {}).get(key) for key in shown}


class PtqTdqQuantizer(DiffusersQuantizer):  # type: ignore[misc]
    """Loads what was calibrated before; diffusers makes one for each model that it loads.

    ``quantized`` is the :class:`~ptq_tdq.QuantizedModel` around the very model that diffusers holds.
    """

    use_keep_in_fp32_modules = True
    supports_parallel_loading = False
    is_serializable = True
    is_trainable = False
    is_compileable = True

    def __init__(self, quantization_config: PtqTdqConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.quantization_config: PtqTdqConfig
        self.quantized: QuantizedModel
        self._dtype: torch.dtype | None = None
        self._files: list[str] = []
        if not self.pre_quantized and quantization_config.artifact is None:
            raise ConfigError(
                "A model is calibrated before it is loaded: give PtqTdqConfig the folder of an artifact "
                "(ptq-tdq calibrate, or save_pretrained of what ptq_tdq.calibrate gives)."
            )

    def update_torch_dtype(self, torch_dtype: Any) -> Any:
        if torch_dtype is not None and torch_dtype not in _DTYPES:
            raise ConfigError(f"A quantized model computes in float32, bfloat16 or float16. Got {torch_dtype} instead.")
        self._dtype = torch_dtype
        return torch_dtype

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        """Nothing is left for diffusers to load."""
        self._files = checkpoint_files
        return []

    def maybe_update_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        return {}

    def update_missing_keys(self, model: nn.Module, missing_keys: list[str], prefix: str) -> list[str]:
        return []

    def _process_model_before_weight_loading(
        self, model: Any, keep_in_fp32_modules: Iterable[str] = (), **kwargs: Any
    ) -> None:
        given = self.quantization_config.artifact if not self.pre_quantized else None
        artifact = find_artifact(given) if given is not None else self._read(model)
        check_built(artifact)
        if self._dtype is not None:
            artifact = _cast(artifact, self._dtype, frozenset(keep_in_fp32_modules))
        with building():
            self.adopt(QuantizedModel.from_artifact(fold(model), artifact))

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        return model

    def _read(self, model: Any) -> Artifact:
        tensors: dict[str, Tensor] = {}
        for file in self._files:
            try:
                tensors |= load_file(file)
            except (SafetensorError, OSError) as error:
                raise ArtifactCorruptError(f"{Path(file).name} is no safetensors file ({error}).") from error
        return decode_component(self.quantization_config.document, tensors, _model_config(model))

    def adopt(self, quantized: QuantizedModel) -> Any:
        """Let the model of ``quantized`` run at its own time steps wherever it is called; returns it."""
        model: Any = quantized.model
        self.quantization_config.artifact = None
        self.quantization_config.document = component_document(quantized.to_artifact())
        model.register_to_config(quantization_config=self.quantization_config)
        quantized.__class__, model.__class__ = _InPlace, _timed(type(model))  # type: ignore[arg-type]
        self.quantized, model.hf_quantizer = quantized, self
        model.is_quantized, model.quantization_method = True, Method.PTQ_TDQ
        return model

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Any], safe_serialization: bool = False
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """What is saved: the artifact's tensors."""
        if not safe_serialization:
            raise ConfigError("A quantized model is saved as safetensors only; leave out safe_serialization=False.")
        artifact = self.quantized.to_artifact()
        check_built(artifact)
        return component_tensors(artifact), {}


def as_diffusers(quantized: QuantizedModel) -> Any:
    """The denoiser of a quantized model as diffusers' own class, for a pipeline that is to be saved or asks for it.

    ::

        pipe.unet = as_diffusers(load_quantized("out"))  # or what calibrate gives
        pipe.save_pretrained("folder")

    A ControlNet's pipeline takes no other class. The result computes what ``quantized`` does, and is the model inside
    it. Raises :class:`~ptq_tdq.errors.ModelError` for a class that is not diffusers' own.
    """
    model: Any = quantized.model
    if not isinstance(model, ModelMixin):
        raise ModelError(f"A {type(model).__name__} is no model of diffusers; save it with its own save_pretrained.")
    if not isinstance(getattr(model, "hf_quantizer", None), PtqTdqQuantizer):
        PtqTdqQuantizer(PtqTdqConfig()).adopt(quantized)
    return model


def export_component(artifact: Given, path: str | Path) -> None:
    """Write the folder of a pipeline's component, all or nothing.

    ``artifact`` is a folder, a hub id, or what :func:`~ptq_tdq.calibrate` gave. Raises
    :class:`~ptq_tdq.errors.OutputError` where that is impossible, :class:`~ptq_tdq.errors.ModelError` for a class that
    is not diffusers' own, and as :func:`~ptq_tdq.load_quantized` does.
    """
    model = as_diffusers(build_quantized(as_artifact(artifact)))
    with publish_directory(path) as folder:
        try:
            model.save_pretrained(folder)
        except SafetensorError as error:  # of a full disk, with the system's number in its text alone
            number = re.search(r"os error (\d+)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


class _InPlace(QuantizedModel):
    """A quantized model whose model is called itself."""

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        plain: Any = type(self.model)
        return plain.untimed.__call__(self.model, *args, **kwargs)


@cache
def _timed(cls: type[nn.Module]) -> Any:
    """The class ``cls`` whose calls run at the time steps of their own arguments."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.hf_quantizer.quantized(*args, **kwargs)

    def to(self: Any, *args: Any, **kwargs: Any) -> Any:
        asked = [given for given in (*args, *kwargs.values()) if given is not None]
        own = not asked or any(given is self.dtype for given in asked)  # by what loads image prompts, or saves adapters
        return nn.Module.to(self, *args, **kwargs) if own else cls.to(self, *args, **kwargs)

    def state_dict(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _StateDict(cls.state_dict(self, *args, **kwargs))

    def enable_gradient_checkpointing(self: Any, gradient_checkpointing_func: Any = None) -> None:
        cls.enable_gradient_checkpointing(self, checkpoint_in_call(gradient_checkpointing_func))  # type: ignore[attr-defined]

    refused = {"fuse_lora": _refuse_to_fuse, "fuse_qkv_projections": TimedModel.fuse_qkv_projections}
    own = {"to": to, "state_dict": state_dict, "enable_gradient_checkpointing": enable_gradient_checkpointing}
    others = {"untimed": cls, **own, **refused}
    adapters = {name: _adapting(getattr(cls, name)) for name in ADAPTERS if hasattr(cls, name)}
    return called_by(cls, call, _timed, **others, **adapters)


def _adapting(method: Callable[..., None]) -> Callable[..., None]:
    """A method that puts adapters beside layers, where these are quantized."""

    @wraps(method)
    def adapt(model: Any, *args: Any, **kwargs: Any) -> None:
        with _plain_classes(model):
            method(model, *args, **kwargs)

    return adapt


class _StateDict(OrderedDict[str, Any]):
    """A state dict that finds a quantized layer's tensors also by the names that they have in full precision.

    Pipelines ask so for the shape of the weight that an adapter goes beside.
    """

    def __init__(self, state: Any) -> None:
        super().__init__(state)
        vars(self).update(vars(state))  # torch's metadata

    def __reduce__(self) -> Any:
        """What is copied or written is a plain one."""
        plain = OrderedDict(self)
        vars(plain).update(vars(self))
        return plain.__reduce__()

    def copy(self) -> _StateDict:
        return _StateDict(self)

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or super().__contains__(_name_inside(str(name)))

    def __missing__(self, name: str) -> Any:
        if name not in self:
            raise KeyError(name)
        return self[_name_inside(name)]


def _name_inside(name: str) -> str:
    """Where a quantized layer holds the tensor that is called ``name`` in full precision."""
    layer, _, own = name.rpartition(".")
    return f"{layer}.{QuantLayer._inside}.{own}"


def _refuse_to_fuse(model: Any, *args: Any, **kwargs: Any) -> None:
    raise ModelError(
        "A LoRA cannot be fused into integer weights: leave it beside them, or fuse it into the full-precision "
        "pipeline (pipe.fuse_lora(), pipe.unload_lora_weights()) and calibrate that."
    )


@contextmanager
def _plain_classes(model: nn.Module) -> Iterator[None]:
    """While open, each quantized layer is of its original's class too, and holds no other of it.

    PEFT asks for the class before it goes beside a layer, and goes through all that there are.
    """
    layers = [(layer, layer._modules) for layer in model.modules() if isinstance(layer, QuantLayer)]
    for layer, _ in layers:
        layer.__class__ = _of_both(type(layer.layer))  # type: ignore[arg-type]
        vars(layer)[layer._inside] = layer.layer
        layer._modules = {}
    try:
        yield
    finally:
        for layer, modules in layers:
            layer.__class__ = QuantLayer
            layer._modules = modules
            del vars(layer)[layer._inside]


@cache
def _of_both(cls: type[nn.Module]) -> Any:
    def new(own: type, *args: Any, **kwargs: Any) -> nn.Module:
        return cls(*args, **kwargs)  # what PEFT makes of this class is its own

    return type(cls.__name__, (QuantLayer, cls), {"__new__": new})


def _cast(artifact: Artifact, dtype: torch.dtype, keep: frozenset[str]) -> Artifact:
    """The artifact of a model in ``dtype``, but for what has a name in ``keep``; intervals are float32 in any model."""

    def of(name: str) -> torch.dtype:
        return torch.float32 if keep & set(name.split(".")) else dtype

    state = artifact.float_state
    return replace(
        artifact,
        config={**artifact.config, "buffer_dtypes": {}},  # diffusers builds them in the dtype that it loads
        layers=tuple(replace(x, dtype=dtype_name(of(x.name))) for x in artifact.layers),
        float_state={name: x.to(of(name)) if x.is_floating_point() else x for name, x in state.items()},
    )


def _model_config(model: Any) -> dict[str, Any]:
    return {key: value for key, value in base_config(model).items() if key != "quantization_config"}


AUTO_QUANTIZER_MAPPING[Method.PTQ_TDQ.value] = PtqTdqQuantizer
AUTO_QUANTIZATION_CONFIG_MAPPING[Method.PTQ_TDQ.value] = PtqTdqConfig
