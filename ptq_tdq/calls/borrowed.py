"""Calls of a model beside those that its user makes, which change nothing that it keeps from one call to the next."""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

_CONTAINERS = (list, dict, OrderedDict, defaultdict, deque)  # which may contain themselves
_OF_TORCH = vars(nn.Module()).keys()


@contextmanager
def borrowed(model: nn.Module) -> Iterator[None]:
    """While open, ``model`` works on copies of its buffers and attributes, and random numbers are others'.

    Copied are tensors, and the containers that hold them or plain values (a step counter, a cache of features); what
    objects of other classes keep is not. What modules share, they share.
    """
    own = [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
    kept = [(space, dict(space)) for module in own for space in (vars(module), module._buffers)]
    known: dict[int, tuple[Any, Any]] = {}
    devices = {p.device for p in model.parameters() if p.is_cuda}
    try:
        for space, before in kept:
            space.update({name: _copied(x, known) for name, x in before.items() if name not in _OF_TORCH})
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        for space, before in kept:
            for name in space.keys() - before.keys():
                del space[name]
            space.update(before)


def _copied(value: Any, known: dict[int, tuple[Any, Any]]) -> Any:
    """``known`` holds each copy with what it is of, by its id: what contains itself does so in the copy, too."""
    if id(value) in known:
        return known[id(value)][1]
    if isinstance(value, Tensor):
        new = value if isinstance(value, nn.Parameter) else value.detach().clone()
    elif isinstance(value, set) or type(value) in _CONTAINERS:
        new = copy(value)
    else:  # a leaf, or one of the other trees (tuples, classes that are registered), whose parts have their turn
        parts, form = pytree.tree_flatten(value, is_leaf=lambda x: x is not value)
        return pytree.tree_unflatten([part if part is value else _copied(part, known) for part in parts], form)
    known[id(value)] = value, new
    if type(value) in _CONTAINERS:
        for key in value if isinstance(value, dict) else range(len(value)):
            new[key] = _copied(value[key], known)
    return new
