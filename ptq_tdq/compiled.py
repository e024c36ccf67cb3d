"""What ``torch.compile`` makes of modules and functions, and what these were before."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

COMPILED = "_orig_mod"  # what a module of torch.compile calls the one that it was made of
COMPILED_FUNCTION = "_torchdynamo_orig_callable"  # what a function of torch.compile calls that one


def uncompiled(value: Any) -> Any:
    """What ``torch.compile`` was given, where ``value`` is what it made of that."""
    return value._modules.get(COMPILED, value) if isinstance(value, nn.Module) else value


def take_hooks(module: nn.Module, around: nn.Module, copies: dict[int, Any]) -> None:
    """Give a copy the hooks of what was ``around`` the original: they run before its own, and those of outputs after.

    ``copies`` are those that were made, as :func:`copy.deepcopy` keeps them.
    """
    for name in ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"):
        given = copy.deepcopy(getattr(around, name), copies)
        setattr(module, name, type(given)({**given, **getattr(module, name)}))
    for name in ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"):
        getattr(module, name).update(copy.deepcopy(getattr(around, name), copies))
