"""What to quantize: one traced forward pass finds layers, order, roles and split shortcuts; the config decides.

Nothing depends on names inside the model's source: the order, the time-embedding layers (inputs without a spatial or
token axis) and the concatenations that feed a layer are observed, only the kind of a parent module is looked up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ptq_tdq.blocks import unit_of
from ptq_tdq.config import Config, Role
from ptq_tdq.errors import ModelError
from ptq_tdq.modules import layer_kind
from ptq_tdq.modules.attention import OPERANDS
from ptq_tdq.records import LayerRecord, QuantizerRecord
from ptq_tdq.timed_model import require_timestep


@dataclass(frozen=True)
class Traced:
    """One call of a quantizable module: its input's width and number of axes, and the widths concatenated into it."""

    name: str
    module: nn.Module
    width: int
    axes: int
    parts: tuple[int, ...]


class _Concatenations(TorchFunctionMode):
    """Remembers, for each tensor made by torch.cat along dim 1, the widths of its parts."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[Tensor, tuple[int, ...]]] = []  # the tensors stay alive, so identity is unambiguous

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.cat:
            dim = (kwargs or {}).get("dim", args[1] if len(args) > 1 else 0)
            tensors = args[0] if args else (kwargs or {})["tensors"]
            if dim == 1:
                self.made.append((result, tuple(part.shape[1] for part in tensors)))
        return result

    def parts(self, x: Tensor) -> tuple[int, ...]:
        return next(
            (widths for made, widths in self.made if made.data_ptr() == x.data_ptr() and made.shape == x.shape), ()
        )


def trace(model: nn.Module, call: Callable[[], Any]) -> list[Traced]:
    """The quantizable modules in the order in which ``call`` (one forward pass of the model) runs them."""
    found: dict[str, Traced] = {}
    mode = _Concatenations()

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0]
            width = x.shape[-1] if layer_kind(module) == "linear" else x.shape[1]
            # dim 1 holds tokens in [B, N, C], and a grouped weight has no columns for a second range
            channels = (layer_kind(module) != "linear" or x.ndim == 2) and getattr(module, "groups", 1) == 1
            found.setdefault(name, Traced(name, module, width, x.ndim, mode.parts(x) if channels else ()))

        return hook

    watched = ((m, watch(n)) for n, m in model.named_modules() if layer_kind(m) or isinstance(m, Attention))
    with _hooks(watched), torch.no_grad(), mode:
        call()
    return list(found.values())


@contextmanager
def _hooks(pairs: Iterator[tuple[nn.Module, Any]]) -> Iterator[None]:
    handles = [module.register_forward_pre_hook(hook) for module, hook in pairs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _roles(model: nn.Module, traced: list[Traced]) -> dict[str, set[Role]]:
    layers = [t for t in traced if layer_kind(t.module)]
    spatial = [t for t in layers if t.axes > 2]
    roles: dict[str, set[Role]] = {t.name: set() for t in traced}
    for t in layers:
        parent_name, _, own = t.name.rpartition(".")
        parent = model.get_submodule(parent_name)
        if t.axes == 2:
            roles[t.name].add("time_embedding")
        if isinstance(parent, ResnetBlock2D) and own == "conv_shortcut":
            roles[t.name].add("shortcut")
        if isinstance(parent, Downsample2D):
            roles[t.name].add("downsample")
    if spatial:
        roles[spatial[0].name].add("first")
        roles[spatial[-1].name].add("last")
    return roles


def make_plan(model: nn.Module, config: Config, call: Callable[[], Any]) -> tuple[LayerRecord, ...]:
    """The layers to quantize, in execution order.

    ``call`` runs one forward pass of the model. Raises :class:`ModelError` for a model without a timestep argument,
    a skip pattern that matches nothing, or when no layer is left.
    """
    require_timestep(model)
    traced = trace(model, call)
    roles = _roles(model, traced)
    for pattern in config.skip:
        if not any(fnmatchcase(t.name, pattern) for t in traced):
            raise ModelError(f"The skip pattern {pattern!r} matches no layer; `ptq-tdq inspect` lists the names.")
    scheme, records = config.parsed_scheme, []
    for t in traced:
        mine = roles[t.name]
        if mine & set(config.float_layers) or any(fnmatchcase(t.name, pattern) for pattern in config.skip):
            continue
        kind = layer_kind(t.module)
        if kind is None and not config.attention:
            continue

        weight_only = bool(mine & set(config.weight_only_layers))
        eight = weight_only or bool(mine & set(config.eight_bit_layers))
        fixed = bool(mine & set(config.fixed_layers))
        method = "fixed" if fixed else config.method
        bits = 8 if eight else scheme.activation_bits
        range_method = "minmax" if fixed else config.activation_range
        unit = unit_of(model, t.name)
        if kind is None:
            inputs = tuple(
                QuantizerRecord(f"{t.name}.{o}", config.softmax_bits, config.method, config.activation_range, True)
                if o == "softmax"
                else QuantizerRecord(f"{t.name}.{o}", bits, method, range_method)
                for o in OPERANDS
            )
            records.append(LayerRecord(t.name, "attention", unit, (), None, inputs))
            continue
        split = config.split_shortcuts and len(t.parts) > 1 and not weight_only
        splits = (0, *_running_sum(t.parts)) if split else (0, t.width)
        names = [f"{t.name}.{i}" for i in range(len(t.parts))] if split else [t.name]
        inputs = tuple(QuantizerRecord(name, bits, method, range_method) for name in names if not weight_only)
        weight_bits = 8 if eight else scheme.weight_bits
        records.append(LayerRecord(t.name, kind, unit, splits, weight_bits, inputs))
    if not any(r.weight_bits for r in records):
        raise ModelError(
            "0 layers of the model match: nothing would be quantized; check the skip list and the layers kept float."
        )
    return tuple(records)


def _running_sum(widths: tuple[int, ...]) -> list[int]:
    return [sum(widths[: i + 1]) for i in range(len(widths))]
