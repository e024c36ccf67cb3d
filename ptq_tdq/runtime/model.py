"""The model that runs in integers, from an artifact."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import CDLL
from itertools import chain, pairwise
from typing import Any, Self

import torch
from torch import Tensor, nn

from ptq_tdq.artifacts import Artifact
from ptq_tdq.errors import ModelError, NonFiniteError, RuntimeUnsupportedError
from ptq_tdq.fit import check_fit
from ptq_tdq.modules import layer_kind
from ptq_tdq.processor import instruction_set, sums_eight_bits
from ptq_tdq.records import LayerRecord
from ptq_tdq.runtime.attention import Attend, native_attend, reference_attend
from ptq_tdq.runtime.blocks import IntegerAttention, fuse
from ptq_tdq.runtime.kernels import Quantize, reference_quantize
from ptq_tdq.runtime.layer import IntegerLayer, Part, WeightOnlyLayer
from ptq_tdq.runtime.native import native_quantize, open_library
from ptq_tdq.runtime.products import FloatProducts, Geometry, NativeProducts, OneDnnProducts, Products, Weights
from ptq_tdq.runtime.step import Step
from ptq_tdq.timed_model import TimedModel


class IntegerModel(TimedModel):
    """Quantized convolutions and linears run as u8 x s8 products with int32 sums; the rest in float32.

    Scale and zero point come from the artifact's tables at the model's own ``timestep``. ``facts`` says what runs.
    CPU only, inference only.
    """

    def __init__(self, model: nn.Module, artifact: Artifact) -> None:
        """Replace layers of ``model``, built on the meta device: nothing of it is used but its structure.

        Raises :class:`~ptq_tdq.errors.ArtifactMismatchError` for an artifact of another model, and
        :class:`RuntimeUnsupportedError` where a layer has no integer form.
        """
        check_fit(model, artifact)
        super().__init__(model.eval().requires_grad_(False))
        self.provenance, self.metrics = artifact.config, artifact.metrics
        self.step = Step(artifact)
        engine = _Engine()
        layers = [record for record in artifact.layers if record.kind != "attention"]
        for record in layers:
            _replace(model, record.name, engine.layer(model.get_submodule(record.name), record, artifact, self.step))
        state = {k: v for k, v in artifact.float_state.items() if k.removesuffix(".bias") not in artifact.weight_codes}
        model.load_state_dict(state, strict=False, assign=True)
        for name, tensor in chain(model.named_parameters(), model.named_buffers()):
            if tensor.is_meta:  # made by the model itself, and no part of its state
                raise RuntimeUnsupportedError(f'The tensor {name} has no integer form yet; use backend="simulated".')
        model.float().requires_grad_(False)
        _know_dtype(model)
        for record in artifact.layers:
            if record.kind == "attention":
                block = IntegerAttention.of(model.get_submodule(record.name), record, self.step, engine.attend)
                if block is None:
                    raise RuntimeUnsupportedError(
                        f'The attention of {record.name} has no integer form yet; use backend="simulated".'
                    )
                _replace(model, record.name, block)
        self.facts: dict[str, Any] = {
            "instructions": instruction_set(),
            "products": " and ".join(engine.products) or "nothing",
            "passes": engine.passes,
            "integer_layers": sum(bool(record.inputs) for record in layers),
            "weight_only_layers": [record.name for record in layers if not record.inputs],
            "float_layers": sorted(n for n, m in model.named_modules() if layer_kind(m)),
            "fused_blocks": len(fuse(model)),
            "weight_bytes": sum(m.nbytes for m in model.modules() if isinstance(m, IntegerLayer | WeightOnlyLayer))
            + sum(p.nbytes for p in model.parameters()),
        }

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped model's forward, in float32 whatever the dtype of its inputs and an autocast around it.

        Raises :class:`NonFiniteError` for NaN or Inf, which codes cannot hold, and :class:`ModelError` for an empty
        batch or a tensor that is not on the CPU.
        """
        _check_inputs((args, kwargs))
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            return super().forward(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """``to("cpu")`` and the like change nothing; another dtype or device would be another model."""
        moved = fn(torch.empty(0, dtype=torch.float32))
        if moved.dtype != torch.float32 or moved.device.type != "cpu":
            raise RuntimeUnsupportedError(
                f"The integer model computes in float32 on the CPU. Got {moved.dtype} on {moved.device} instead; "
                'use backend="simulated" there.'
            )
        return self

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def at(self, t: Tensor | float | int) -> None:
        self.step.set(t)


class _Engine:
    """Which kernels run on this processor."""

    def __init__(self) -> None:
        found = open_library()
        self.library = found if isinstance(found, CDLL) else None
        self.quantize: Quantize = native_quantize(self.library) if self.library else reference_quantize
        self.attend: Attend = native_attend(self.library) if self.library else reference_attend
        self.passes = "native C" if self.library else f"torch ({found})"
        # AMX has four times the rate of our kernels' instructions, and oneDNN uses it
        self.native = self.library is not None and instruction_set() != "amx-int8"
        self.products: dict[str, None] = {}  # what computes, in order of first use

    def layer(self, layer: nn.Module, record: LayerRecord, artifact: Artifact, step: Step) -> nn.Module:
        """The integer form of one layer."""
        name, geometry = record.name, Geometry.of(layer, record.name)
        codes, scales, zero_points = (
            of[name] for of in (artifact.weight_codes, artifact.weight_scale, artifact.weight_zero_point)
        )
        codes = codes.view(*codes.shape[:2], *geometry.kernel)
        no_bias = torch.zeros(len(codes), dtype=torch.float32)
        bias = artifact.float_state.get(f"{name}.bias", no_bias).float()
        ranges = list(pairwise(record.splits))
        parts = []
        for index, channels in enumerate(ranges):
            weights = Weights(
                codes[:, slice(*channels)] if len(ranges) > 1 else codes,  # a grouped weight has fewer columns
                record.weight_bits or 0,
                scales[:, index].expand(len(codes)).contiguous(),
                zero_points[:, index].expand(len(codes)).contiguous(),
                bias if index == 0 else no_bias,
            )
            if not record.inputs:
                if record.kind == "linear":
                    return WeightOnlyLayer(weights.narrow.flatten(1), weights.scale, bias)
                return WeightOnlyLayer(weights.narrow, weights.scale, bias, geometry)
            quantizer = record.inputs[index]
            weights = weights.padded() if geometry.groups == 1 else weights
            pitch = weights.codes.shape[1] * geometry.groups
            products = self._products(weights, geometry)
            self.products[products.name] = None
            parts.append(Part(quantizer, channels, pitch, products))
        return IntegerLayer(record, parts, geometry.padding, step, self.quantize)

    def _products(self, weights: Weights, geometry: Geometry) -> Products:
        if self.library is not None and self.native and NativeProducts.covers(weights, geometry):
            return NativeProducts(weights, geometry, self.library)
        return OneDnnProducts(weights, geometry) if sums_eight_bits() else FloatProducts(weights, geometry)


def _check_inputs(value: Any) -> None:
    """Every tensor among the arguments, also of a dict or list."""
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, list | tuple):
        for inner in value:
            _check_inputs(inner)
    if not isinstance(value, Tensor):
        return
    if value.device.type != "cpu":
        raise ModelError(f"The integer backend runs on the CPU. Got a tensor on {value.device}; move it there.")
    if not value.numel():
        raise ModelError(f"The model was given an empty tensor {list(value.shape)}; pass at least one sample.")
    if value.is_complex():
        raise ModelError("The model was given complex numbers; pass real ones.")
    if value.is_floating_point() and not bool(value.float().isfinite().all()):
        raise NonFiniteError("The model was given NaN or Inf; the integer backend has no codes for them.")


def _know_dtype(model: nn.Module) -> None:
    """Make ``model.dtype`` a constant: diffusers walks all modules for it, twice in each forward pass of a U-Net."""
    cls = type(model)
    model.__class__ = type(cls.__name__, (cls,), {"dtype": torch.float32, "__module__": cls.__module__})


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, module)
