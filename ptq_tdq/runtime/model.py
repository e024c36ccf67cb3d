"""The model that runs in integers, from an artifact."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from ctypes import CDLL
from itertools import chain
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ptq_tdq.artifacts import Artifact
from ptq_tdq.errors import ModelError, RuntimeUnsupportedError
from ptq_tdq.fit import check_fit
from ptq_tdq.modules import layer_kind
from ptq_tdq.modules.products import attach, owner_of
from ptq_tdq.processor import instruction_set, sums_eight_bits
from ptq_tdq.records import LayerRecord
from ptq_tdq.rotate import rotated
from ptq_tdq.runtime.attention import Attend, IntegerProduct, native_attend, reference_attend
from ptq_tdq.runtime.fuse import fuse
from ptq_tdq.runtime.kernels import (
    Grid,
    Quantize,
    Rotate,
    WeightOnly,
    reference_quantize,
    reference_weight_only,
)
from ptq_tdq.runtime.layer import FORMS, ChannelRange, CodedLayer, IntegerLayer, TransposedLayer, WeightOnlyLayer
from ptq_tdq.runtime.native import native_quantize, native_rotate, native_weight_only, open_library
from ptq_tdq.runtime.native_layer import NativeLayer
from ptq_tdq.runtime.products import FloatProducts, Geometry, NativeProducts, OneDnnProducts, Products, Weights, narrow
from ptq_tdq.runtime.step import Step
from ptq_tdq.timed_model import TimedModel, check_finite, in_dtype
from ptq_tdq.wrap import set_tensors

FEW = 64  # samples whose time steps are read one by one


class IntegerModel(TimedModel):
    """Quantized convolutions and linears run as u8 x s8 products with int32 sums, and attention on codes.

    Scale and zero point come from the artifact's tables at the model's own time step. All else is float32, also where
    the model was of half or double precision: floating inputs are cast, and outputs are cast back to the model's
    ``dtype``, or to that of x where it is lower. Calls of several threads do not disturb each other. ``facts`` says
    what runs. CPU only, inference only.
    """

    def __init__(self, model: nn.Module, artifact: Artifact) -> None:
        """Replace layers of ``model``: nothing of it is used but its structure, and tensors that are not saved.

        Raises :class:`~ptq_tdq.errors.ArtifactMismatchError` for an artifact of another model, and
        :class:`RuntimeUnsupportedError` where a tensor that is not saved has no values.
        """
        check_fit(model, artifact)
        super().__init__(model.eval().requires_grad_(False), artifact.time_axis)
        self.provenance, self.metrics = artifact.config, artifact.metrics
        self._dtype = _dtype_of(artifact)
        self.step = Step(artifact)
        engine = _Engine()
        for record in artifact.layers:
            if record.kind == "product":
                product = IntegerProduct(record, self.step, engine.attend)
                attach(model.get_submodule(owner_of(record.name)[0]), product)
            else:
                layer = engine.layer(model.get_submodule(record.name), record, artifact, self.step)
                _replace(model, record.name, layer)
        _load_rest(model, artifact, self._dtype)
        _know_dtype(model)
        model.register_forward_pre_hook(self.step.begin)
        model.register_forward_hook(self.step.end, always_call=True)
        self.facts = _facts(model, artifact, engine, fused_blocks=len(fuse(model)))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped model's forward, in float32 whatever the dtype of its inputs and an autocast around it.

        Raises :class:`~ptq_tdq.errors.NonFiniteError` for NaN or Inf, which codes cannot hold, :class:`ModelError`
        for an empty batch or a tensor that is not on the CPU, and :class:`RuntimeUnsupportedError` for one that is to
        get a gradient.
        """
        for leaf in pytree.tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                _check_input(leaf)
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            output = super().forward(*args, **kwargs)
        return output if self.dtype == torch.float32 else in_dtype(output, self.dtype)

    def _t(self, value: Any) -> Tensor:
        """In numbers of Python's where few of them are whole ones: arithmetic of tensors takes as long as a layer."""
        plain = type(value) is Tensor and value.dtype in (torch.int64, torch.float32) and value.ndim < 2
        plain = plain and not torch.compiler.is_compiling()
        if plain and 0 < value.numel() <= FEW and (self.axis.scale, self.axis.offset) == (1, 0):
            numbers, known = value.reshape(-1).tolist(), range(self.axis.length)
            if all(t in known for t in numbers):
                return torch.tensor(numbers, dtype=torch.float32)
        return super()._t(value)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Raises :class:`ModelError`: what is saved is the artifact that this was read from."""
        raise ModelError(
            "The integer model is not saved; keep the artifact that it was read from, or save its simulated model."
        )

    push_to_hub = save_pretrained

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Raises :class:`ModelError`: codes and intervals are in no state dict."""
        raise ModelError(
            "The integer model takes no other weights, since its codes are in no state dict; load the other artifact."
        )

    def __repr__(self) -> str:
        """Short, since diffusers prints a component that it does not save."""
        return f"<IntegerModel of {type(self.model).__name__}, {self.facts['products']}>"

    def __copy__(self) -> IntegerModel:
        copied = type(self).__new__(type(self))
        copied.__dict__.update(self.__dict__)
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> IntegerModel:
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__dict__.update(deepcopy(self.__dict__, memo))
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Raises :class:`ModelError`: it holds addresses of this process."""
        raise ModelError(
            "The integer model is not pickled; in the other process, load_quantized(folder, backend='integer')."
        )

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
    def all_float32(self) -> bool:
        return True

    @property
    def dtype(self) -> torch.dtype:
        """That of the model it was made from: what a pipeline around it works in."""
        return self._dtype

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")


def _dtype_of(artifact: Artifact) -> torch.dtype:
    counted = Counter(record.dtype for record in artifact.layers if record.kind != "product")
    dtype = getattr(torch, counted.most_common(1)[0][0]) if counted else torch.float32
    assert isinstance(dtype, torch.dtype)
    return dtype


class _Engine:
    """Which kernels run on this processor."""

    def __init__(self) -> None:
        found = open_library()
        self.library = found if isinstance(found, CDLL) else None
        self.quantize: Quantize = native_quantize(self.library) if self.library else reference_quantize
        self.weight_only: WeightOnly = native_weight_only(self.library) if self.library else reference_weight_only
        self.rotate: Rotate = native_rotate(self.library) if self.library else rotated
        self.attend: Attend = native_attend(self.library) if self.library else reference_attend
        self.passes = "native C" if self.library else f"torch ({found})"
        # AMX has four times the rate of our kernels' instructions, and oneDNN uses it
        self.native = self.library is not None and instruction_set() != "amx-int8"
        self.products: dict[str, None] = {}  # what computes, in order of first use

    def layer(self, layer: nn.Module, record: LayerRecord, artifact: Artifact, step: Step) -> nn.Module:
        """The integer form of one layer."""
        name, outputs = record.name, len(artifact.weight_codes[record.name])
        ranges = record.ranges
        bias = artifact.float_state.get(f"{name}.bias")
        bias = None if bias is None else bias.float()
        scales, zero_points = (
            [of[name][:, index].expand(outputs).contiguous() for index in range(len(ranges))]
            for of in (artifact.weight_scale, artifact.weight_zero_point)
        )
        if not record.inputs:
            codes = narrow(artifact.weight_codes[name], zero_points[0])
            return WeightOnlyLayer(layer, codes, scales[0], bias, self.weight_only)
        if record.kind not in FORMS:
            self.products[FloatProducts.name] = None
            ours = [artifact.weight_codes[name][:, slice(*channels)] for channels in ranges]
            signed = [narrow(c, z) for c, z in zip(ours, zero_points, strict=True)]
            return TransposedLayer(layer, record, signed, scales, bias, step)
        geometry = Geometry.of(layer)
        no_bias = torch.zeros(outputs, dtype=torch.float32)
        parts: list[ChannelRange] = []
        rest = no_bias if bias is None else bias  # is added once
        for index, channels in enumerate(ranges):
            products = []
            for codes in _planes(artifact.weight_codes[name], channels if len(ranges) > 1 else None, geometry):
                weights = Weights(codes, record.weight_bits or 0, scales[index], zero_points[index], rest)
                weights = weights.padded() if geometry.groups == 1 else weights
                products.append(self._products(weights, geometry))
                rest = no_bias
            pitch = weights.codes.shape[1] * geometry.groups
            grid = Grid(channels, pitch, record.inputs[index].bits, geometry.padding)
            parts.append(
                ChannelRange(record.inputs[index], channels, pitch, tuple(products), self._whole(grid, products[0]))
            )
        divisor = artifact.divisors.get(name)
        gain = None if divisor is None else divisor.reciprocal()
        return FORMS[record.kind](layer, record, parts, scales[0], bias, step, self.quantize, gain, self.rotate)

    def _whole(self, grid: Grid, products: Products) -> NativeLayer | None:
        """A layer in one call, where that is there."""
        if self.library is None or not isinstance(products, NativeProducts) or not products.single:
            return None
        return NativeLayer(self.library, grid, products)

    def _products(self, weights: Weights, geometry: Geometry) -> Products:
        products: Products
        if self.library is not None and self.native and NativeProducts.covers(weights, geometry):
            products = NativeProducts(weights, geometry, self.library)
        else:
            products = OneDnnProducts(weights, geometry) if sums_eight_bits() else FloatProducts(weights, geometry)
        self.products[products.name] = None
        return products


def _planes(codes: Tensor, channels: tuple[int, int] | None, geometry: Geometry) -> list[Tensor]:
    """Weights [O, C, ...] of some channels as [O, C, kh, kw]; of a Conv3d one for each place of its kernel in depth."""
    codes = codes if channels is None else codes[:, slice(*channels)]
    codes = codes.reshape(*codes.shape[:2], -1, *geometry.kernel)
    return [plane.contiguous() for plane in codes.unbind(2)]


def _load_rest(model: nn.Module, artifact: Artifact, dtype: torch.dtype) -> None:
    """The tensors that stay in floating point, in float32 where they are of half precision or of the model's ``dtype``.

    Raises :class:`RuntimeUnsupportedError` for a tensor without values: one that is not saved, in a model of the meta
    device.
    """
    state = {k: v for k, v in artifact.float_state.items() if k.removesuffix(".bias") not in artifact.weight_codes}
    set_tensors(model, state)
    model._apply(lambda x: x.float() if x.dtype in (torch.float16, torch.bfloat16, dtype) else x)
    model.requires_grad_(False)
    for name, module in model.named_modules():
        own = chain(module._parameters.items(), module._buffers.items(), vars(module).items())
        for key, value in own:
            if isinstance(value, Tensor) and value.is_meta:
                raise RuntimeUnsupportedError(
                    f'The tensor {name}.{key} is not saved and has no values here; use backend="simulated".'
                )


def _facts(model: nn.Module, artifact: Artifact, engine: _Engine, *, fused_blocks: int) -> dict[str, Any]:
    """What runs how, JSON-ready."""
    coded = [module for module in model.modules() if isinstance(module, CodedLayer)]
    theirs = {id(parameter) for module in coded for parameter in module.parameters()}
    rest = sum(parameter.nbytes for parameter in model.parameters() if id(parameter) not in theirs)
    layers = [record for record in artifact.layers if record.kind != "product"]
    kinds = Counter(record.kind for record in layers if record.inputs)
    return {
        "instructions": instruction_set(),
        "products": " and ".join(engine.products) or "nothing",
        "passes": engine.passes,
        "integer_layers": sum(kinds.values()),
        "integer_kinds": dict(sorted(kinds.items())),
        "integer_products": sum(record.kind == "product" for record in artifact.layers),
        "weight_only_layers": [record.name for record in layers if not record.inputs],
        "float_layers": sorted(name for name, module in model.named_modules() if layer_kind(module)),
        "notices": list(artifact.metrics.get("notices", [])),  # what else is in floating point, products among it
        "fused_blocks": fused_blocks,
        "weight_bytes": rest
        + sum(m.nbytes for m in coded if isinstance(m, IntegerLayer | WeightOnlyLayer | TransposedLayer)),
    }


def _check_input(x: Tensor) -> None:
    """Raise for a tensor that the model cannot be called with."""
    if x.device.type != "cpu":
        raise ModelError(f"The integer backend runs on the CPU. Got a tensor on {x.device}; move it there.")
    if x.ndim and not x.shape[0]:
        raise ModelError(f"The model was given an empty tensor {list(x.shape)}; pass at least one sample.")
    if x.requires_grad and torch.is_grad_enabled():
        raise RuntimeUnsupportedError(
            'The integer backend computes no gradients; use backend="simulated" for guidance by gradients, or call it '
            "inside torch.no_grad()."
        )
    check_finite(x)


def _know_dtype(model: nn.Module) -> None:
    """Make ``model.dtype`` a constant: diffusers walks all modules for it, twice in each forward pass of a U-Net.

    The wrapped model moves as little as the one around it: C holds addresses of its tensors.
    """
    cls = type(model)
    own = {"dtype": torch.float32, "_apply": IntegerModel._apply, "__module__": cls.__module__}
    model.__class__ = type(cls.__name__, (cls,), own)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, module)
