"""Calls of a model beside those that its user makes, which change nothing that it keeps from one call to the next."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

_OF_TORCH = vars(nn.Module()).keys()


@contextmanager
def borrowed(model: nn.Module) -> Iterator[None]:
    """While open, ``model`` works on copies of its buffers and attributes, and random numbers are others'.

    Copied are tensors, and the containers that hold them or plain values (a step counter, a cache of features); what
    objects of other classes keep is not.
    """
    own = [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
    kept = [(space, dict(space)) for module in own for space in (vars(module), module._buffers)]
    devices = {p.device for p in model.parameters() if p.is_cuda}
    try:
        for space, before in kept:
            space.update({name: pytree.tree_map(_copied, x) for name, x in before.items() if name not in _OF_TORCH})
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        for space, before in kept:
            for name in space.keys() - before.keys():
                del space[name]
            space.update(before)


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value if isinstance(value, nn.Parameter) else value.detach().clone()
    return copy(value) if isinstance(value, set) else value
