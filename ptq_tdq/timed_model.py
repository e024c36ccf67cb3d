"""A module around a denoiser: the original's call signature, with each call's time steps at hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import copy_context
from dataclasses import fields, is_dataclass, replace
from functools import partial
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from ptq_tdq.calls import bind, fresh, main_argument_name
from ptq_tdq.errors import ModelError, NonFiniteError, TimestepError
from ptq_tdq.modules.delegating import Delegating
from ptq_tdq.modules.products import one_by_one
from ptq_tdq.timeaxis import TimeAxis, at

ADAPTERS = ("load_lora_adapter", "add_adapter")  # diffusers' methods that put adapters beside a model's layers


def in_float32(value: Any) -> Any:
    """``value``, or what a dict, list or tuple holds, with the floating tensors in float32."""
    if type(value) is dict:
        return {key: in_float32(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        items = map(in_float32, value)
        return value._make(items) if hasattr(value, "_make") else type(value)(items)  # a tuple whose items have names
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def real_dtypes(tree: Any) -> list[torch.dtype]:
    """Of the floating tensors in a tree."""
    return [x.dtype for x in pytree.tree_leaves(tree) if isinstance(x, Tensor) and x.is_floating_point()]


def in_dtype(output: Any, dtype: torch.dtype) -> Any:
    """A model's output with its floating tensors in ``dtype``."""
    kind = type(output)
    if is_dataclass(kind) and not issubclass(kind, dict):  # a tree knows diffusers' own alone
        return replace(output, **{f.name: in_dtype(getattr(output, f.name), dtype) for f in fields(kind)})
    return pytree.tree_map(lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, output)


def check_finite(x: Tensor) -> None:
    """Raise :class:`NonFiniteError` for NaN or Inf, other than in a mask that is added to scores."""
    if not x.is_floating_point() or isfinite(x.sum(dtype=torch.float32)):  # of all finite numbers, but for an overflow
        return
    if not bool(x.float().isfinite().all()) and not _is_mask(x):
        raise NonFiniteError("The model was given NaN or Inf, for which there are no codes; give it finite numbers.")


def _is_mask(x: Tensor) -> bool:
    """Whether x is what is added to scores, to look nowhere else: 0 and -Inf."""
    return bool(((x == 0) | (x == -torch.inf)).all())


def merged(outputs: Sequence[Any], chosen: Sequence[Tensor]) -> Any:
    """One output of [B] samples, from several of which each is right for the samples ``chosen`` (bool [B])."""
    count = len(chosen[0])

    def of_samples(tree: Any) -> bool:
        return isinstance(tree, list) and len(tree) == count

    def pick(*leaves: Any) -> Any:
        if of_samples(leaves[0]):
            return [next(x[i] for x, own in zip(leaves, chosen, strict=True) if own[i]) for i in range(count)]
        if not isinstance(leaves[0], Tensor) or leaves[0].shape[:1] != (count,):
            return leaves[0]
        whole = leaves[0].clone()
        for leaf, own in zip(leaves, chosen, strict=True):
            whole[own] = leaf[own]
        return whole

    first: Any = outputs[0]
    kind = type(first)
    if is_dataclass(kind) and not issubclass(kind, dict):  # a tree knows diffusers' own alone
        names = [field.name for field in fields(kind)]
        return replace(first, **{n: merged([getattr(x, n) for x in outputs], chosen) for n in names})
    return pytree.tree_map(pick, outputs[0], *outputs[1:], is_leaf=of_samples)


def checkpoint_in_call(function: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """What a model of diffusers checkpoints with (by default torch's own), so that what is computed again for gradients
    has the time steps of the call that it belongs to.
    """
    function = function or partial(checkpoint, use_reentrant=False)

    def run(module: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return function(partial(in_call(), module), *args, **kwargs)

    return run


def in_call() -> Callable[..., Any]:
    """A function that calls another one as inside the present call of the model, whenever that is."""
    context = copy_context()

    def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return context.copy().run(function, *args, **kwargs)

    return call


class TimedModel(Delegating):
    """Calls ``model`` as it is called itself (``pipe.unet = ...``), at the time steps of its own time argument.

    Whatever a pipeline asks of the denoiser beside calling it (``config``, ``dtype``, ``device``, ``cache_context``,
    ...) is asked of the wrapped model. ``provenance`` is the artifact's config document (how the model was made).
    """

    def __init__(self, model: nn.Module, axis: TimeAxis) -> None:
        super().__init__()
        self.model, self.axis = model, axis
        self.provenance: dict[str, Any] = {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped model's forward; raises :class:`~ptq_tdq.errors.TimestepError` for t outside the tables.

        A float32 model takes inputs of any floating dtype, as they come where torch's default dtype is another, and
        gives back x of a lower one as it was given: a pipeline in half precision goes on with that.
        """
        name = self.axis.argument
        arguments = bind(self.model, args, kwargs)
        t, x = self._t(arguments.get(name)), arguments.get(main_argument_name(self.model, name))
        t = t.to(x.device if isinstance(x, Tensor) else self.device)  # offloaded parameters are on no device
        if isinstance(x, Tensor) and x.ndim and len(t) not in (1, *x.shape):  # the samples may be in any dimension
            raise TimestepError(
                f"The model was called with {len(t)} values of {name} for {len(x)} samples; pass one, or one for each."
            )
        cast = any(dtype != torch.float32 for dtype in real_dtypes(arguments)) and self.all_float32
        lower = [dtype for dtype in real_dtypes(x) if dtype.itemsize < torch.float32.itemsize] if cast else []
        if cast:
            args, kwargs, arguments = in_float32(args), in_float32(kwargs), in_float32(arguments)
        output = self._at(t, args, kwargs, arguments)
        return in_dtype(output, lower[0]) if lower else output

    def _at(self, t: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], arguments: dict[str, Any]) -> Any:
        if self.one_step and len(steps := t.unique()) > 1:
            chosen = [t == step for step in steps]
            return merged([self._all_at(step, own, arguments) for step, own in zip(steps, chosen, strict=True)], chosen)
        with at(t), one_by_one(self.one_step):
            return self._call(*args, **kwargs)

    def _t(self, value: Any) -> Tensor:
        """The time argument as t, [1] or [B]."""
        return self.axis.t(value)

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    @property
    def one_step(self) -> bool:
        """Whether rows inside the model cannot be told apart by sample, so that all must have one time step."""
        return bool(self.provenance.get("one_step"))

    def _all_at(self, step: Tensor, own: Tensor, arguments: dict[str, Any]) -> Any:
        """The call with every sample at one time step: those that are not at it (``own``, bool [B]) as the first is."""
        name = self.axis.argument
        value, own = arguments[name].clone(), own.to(arguments[name].device)
        value[~own] = value[own][:1]
        with at(step[None]):
            return self._call(**fresh({**arguments, name: value}))

    def _refuse_adapters(self, *args: Any, **kwargs: Any) -> None:
        """Raises :class:`ModelError`: a pipeline loads adapters, but unloads them from diffusers' own classes alone."""
        raise ModelError(
            "Adapters are loaded onto a simulated model of diffusers' own class: "
            "pipe.unet = ptq_tdq.integrations.diffusers.as_diffusers(ptq_tdq.load_quantized(...))."
        )

    load_lora_adapter = add_adapter = _refuse_adapters

    def fuse_qkv_projections(self) -> None:
        """Raises :class:`ModelError`: a fused layer would be one that nothing has calibrated."""
        raise ModelError(
            "Quantized projections are not fused: call fuse_qkv_projections() on the full-precision model, and "
            "calibrate that."
        )

    def enable_gradient_checkpointing(self, gradient_checkpointing_func: Callable[..., Any] | None = None) -> None:
        """As of diffusers' models."""
        inside: Any = self.model
        inside.enable_gradient_checkpointing(checkpoint_in_call(gradient_checkpointing_func))

    @property
    def all_float32(self) -> bool:
        """Whether the model computes in float32 alone, and not in what its own code casts to."""
        return all(p.dtype == torch.float32 for p in self.model.parameters() if p.is_floating_point())

    @property
    def dtype(self) -> torch.dtype:
        """The model's own word, which leaves out what diffusers keeps in float32, or that of its first numbers."""
        own = getattr(self.model, "dtype", None)
        return (
            own
            if isinstance(own, torch.dtype)
            else next(p.dtype for p in self.model.parameters() if p.is_floating_point())
        )

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device
