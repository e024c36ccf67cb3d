"""Puts quantizers into a model by its plan, and switches them."""

from __future__ import annotations

import copy
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from ptq_tdq.calls import hear_positions
from ptq_tdq.compiled import COMPILED, COMPILED_FUNCTION, take_hooks
from ptq_tdq.errors import ModelError, first_line
from ptq_tdq.modules import ActivationQuantizer, QuantLayer
from ptq_tdq.modules.layers import find_kind
from ptq_tdq.modules.products import QuantProduct, attach, owner_of
from ptq_tdq.records import LayerRecord


def insert(model: nn.Module, record: LayerRecord) -> None:
    """Put the quantizers of one record into ``model``, switched off.

    Raises :class:`ModelError` where the model has no such layer.
    """
    if record.kind == "product":
        attach(_find(model, owner_of(record.name)[0]), QuantProduct(record))
        return
    parent, _, own = record.name.rpartition(".")
    module = _find(model, record.name)
    setattr(model.get_submodule(parent), own, QuantLayer(module, record))


def folded_copy(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode and without gradients, with reparametrized weights made plain.

    What ``torch.compile`` gave in the place of a part, or of its forward, is that again, under its own name, with the
    hooks of both. Hooks that hear of positional arguments alone hear of recorded calls, whose arguments have names.
    Its parameters are in the memory of the model's: neither may be written to, only exchanged. Raises
    :class:`ModelError` for TorchScript, for parameters that have no shape yet and for attributes that cannot be copied.
    """
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ModelError(f"The module {name!r} is TorchScript, which hides its layers; pass a model without it.")
        if any(map(is_lazy, module._parameters.values())):
            raise ModelError(f"The lazy layer {name!r} was never called, so it has no weight; call it, or remove it.")
    shared = {
        id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters() if type(p) is nn.Parameter
    }
    # weights that a hook has computed with gradients, which torch would not copy
    computed = {id(v): v.detach() for m in model.modules() for v in vars(m).values() if isinstance(v, Tensor)}
    copies: dict[int, Any] = {**shared, **computed}
    known = dict(copies)
    try:
        for module in reversed(list(model.modules())):  # parts before what holds them
            if (compiled := module._modules.get(COMPILED)) is not None:
                copies[id(module)] = copy.deepcopy(compiled, copies)
                take_hooks(copies[id(module)], module, copies)
        copied = copy.deepcopy(model, copies)
        for module in copied.modules():
            if (own := getattr(vars(module).get("forward"), COMPILED_FUNCTION, None)) is not None:
                module.forward = copy.deepcopy(own, copies)
    except Exception as error:  # objects of any class raise what they like
        names = ", ".join(f"'{name}'" for name in _not_copied(model, known)) or "something that it holds"
        raise ModelError(
            f"The model cannot be copied, because of {names} ({first_line(error)}); set such attributes to None first, "
            "or make them where they are used."
        ) from error
    hear_positions(copied)
    return fold(copied.eval().requires_grad_(False))


def _not_copied(model: nn.Module, copies: Mapping[int, Any]) -> Iterator[str]:
    """The names of attributes that cannot be copied; ``copies`` are known ones by the id of what they are of."""
    modules = {name: module for name, module in model.named_modules() if COMPILED not in module._modules}
    known = {**copies, **{id(module): module for module in model.modules()}}  # each has its turn
    for path, module in modules.items():
        for name, value in vars(module).items():
            try:
                copy.deepcopy(value, dict(known))
            except Exception:
                yield f"{path}.{name}".lstrip(".")


def fold(model: nn.Module) -> nn.Module:
    """Make reparametrized weights (:mod:`torch.nn.utils.parametrize`, and the hooks of weight norm, spectral norm and
    pruning) plain; returns the model itself.

    And ``nn.TransformerEncoder`` calls the layers inside it, which torch's fast path goes around. A layer of several
    names, or one inside a module of several names, becomes as many layers, which share its weight.
    """
    for module in list(model.modules()):
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # read by the choice of the fast path alone, as is the next one
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
        if parametrize.is_parametrized(module):
            _own_class(module)
            for name in list(module.parametrizations):  # type: ignore[arg-type]
                parametrize.remove_parametrizations(module, name)
                plain = getattr(module, name).detach()
                delattr(module, name)  # torch leaves a buffer where nothing is learned
                module.register_parameter(name, nn.Parameter(plain, requires_grad=False))
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, WeightNorm):
                remove_weight_norm(module, hook.name)
            elif isinstance(hook, SpectralNorm):
                remove_spectral_norm(module, hook.name)
            elif isinstance(hook, prune.BasePruningMethod):
                prune.remove(module, hook._tensor_name)
    _part(model, set())
    return model.requires_grad_(False)


def _part(parent: nn.Module, seen: set[int]) -> None:
    """Give each name of a layer, and of what holds layers, a module of its own, with the same parameters."""
    for name, child in parent._modules.items():
        if child is None:
            continue
        if id(child) in seen and any(find_kind(module) for module in child.modules()):
            own = {key: value.copy() for key, value in vars(child).items() if isinstance(value, dict)}
            parent._modules[name] = child = copy.copy(child)
            vars(child).update(own)
        seen.add(id(child))
        _part(child, seen)


def _own_class(module: nn.Module) -> None:
    """Give a parametrized module its class alone: a copy shares it, and undoing one would undo the other."""
    cls = type(module)
    body = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    module.__class__ = type(cls.__name__, cls.__bases__, body)


def untie(model: nn.Module, names: Iterable[str]) -> None:
    """Give each named layer a weight and a bias of its own, where the model holds one of them in several places."""
    holders = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    for name in names:
        layer = _find(model, name)
        for key, value in layer._parameters.items():
            if value is not None and holders[id(value)] > 1:
                holders[id(value)] -= 1
                layer._parameters[key] = nn.Parameter(value.detach().clone(), requires_grad=False)


def set_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put tensors into ``model``, with the dtype and the device that they have.

    The inverse of :func:`~ptq_tdq.identity.state_of`: what a class or a hook makes of a state dict has no part in it.
    """
    state, errors = {name: value.clone() for name, value in tensors.items()}, list[str]()
    for path, module in model.named_modules(remove_duplicate=False):
        hooks, module._load_state_dict_pre_hooks = module._load_state_dict_pre_hooks, OrderedDict()
        try:
            prefix = f"{path}." if path else ""
            module._load_from_state_dict(state, prefix, {"assign_to_params_buffers": True}, False, [], [], errors)
        finally:
            module._load_state_dict_pre_hooks = hooks
    if errors:
        raise RuntimeError("\n".join(errors))


def _find(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise ModelError(f"The model has no layer named {name!r}; it is not the model of this plan.") from None


def switch(module: nn.Module, *, weights: bool, activations: bool) -> None:
    """Switch the quantizers inside ``module`` on or off."""
    for child in module.modules():
        if isinstance(child, QuantLayer):
            child.weights_enabled = weights
        elif isinstance(child, ActivationQuantizer):
            child.enabled = activations


@contextmanager
def switched(module: nn.Module, *, weights: bool, activations: bool) -> Iterator[None]:
    """Switch the quantizers inside ``module`` for the time of a ``with`` block."""
    before: list[tuple[Any, str, bool]] = []
    for child in module.modules():
        if isinstance(child, QuantLayer):
            before.append((child, "weights_enabled", child.weights_enabled))
        elif isinstance(child, ActivationQuantizer):
            before.append((child, "enabled", child.enabled))
    switch(module, weights=weights, activations=activations)
    try:
        yield
    finally:
        for child, attribute, value in before:
            setattr(child, attribute, value)
