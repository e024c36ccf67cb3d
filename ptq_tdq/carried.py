"""What a model keeps from one call to the next, where it computes with it: a cache of features, a counter of steps.

Calibration, fine-tuning and graphs make each call for itself, so they know nothing of it.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ptq_tdq.calls import Calls, prediction
from ptq_tdq.calls.arguments import REFUSALS
from ptq_tdq.calls.borrowed import borrowed
from ptq_tdq.errors import ModelError

_TURNS = 3  # of two calls, so that a cache that is filled at every fifth call is filled in one of them
_CLOSE = 1e-3  # relative difference of one call made twice

State = dict[str, list[tuple[Any, int]]]


def carried(model: nn.Module, calls: Calls) -> list[str]:
    """The names of the attributes that a call changes, where what ``calls`` give depends on the calls before them."""
    ends = [torch.tensor([row]) for row in (0, len(calls) - 1)]
    with borrowed(model), torch.no_grad():
        before = _state(model)
        with suppress(*REFUSALS):
            model(**calls.inputs(ends[0]))
        after = _state(model)
    changed = [name for name in before.keys() | after.keys() if not _alike(before.get(name, []), after.get(name, []))]
    return sorted(changed) if changed and _depends(model, calls, ends) else []


def refuse_carried(model: nn.Module, calls: Calls) -> None:
    """Raise :class:`ModelError` where :func:`carried` finds something."""
    if names := carried(model, calls):
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise ModelError(
            f"What the model gives depends on the calls before, by what it keeps in '{names[0]}'{more}, but "
            "calibration, fine-tuning and graphs make each call for itself; turn that off first (a cache, say)."
        )


def _state(model: nn.Module) -> State:
    """The parts of each attribute and buffer, which are kept so that no other has their address."""
    own = vars(nn.Module())
    found: State = {}
    for path, module in model.named_modules():
        for name, value in (*vars(module).items(), *module._buffers.items()):
            if name not in own:
                found[f"{path}.{name}".lstrip(".")] = [(x, _version(x)) for x in pytree.tree_leaves(value)]
    return found


def _version(x: Any) -> int:
    return x._version if isinstance(x, Tensor) and not x.is_inference() else 0


def _alike(before: list[tuple[Any, int]], after: list[tuple[Any, int]]) -> bool:
    return len(before) == len(after) and all(
        x is y and old == new for (x, old), (y, new) in zip(before, after, strict=True)
    )


def _depends(model: nn.Module, calls: Calls, ends: list[Tensor]) -> bool:
    """Whether two calls give something else in the other order."""
    found: list[list[Tensor]] = [[], []]
    devices = range(torch.cuda.device_count())
    for first in (0, 1):
        with borrowed(model), torch.no_grad(), torch.random.fork_rng(devices):
            for turn in range(2 * _TURNS):
                end = (first + turn) % 2
                torch.manual_seed(0)  # noise that a model draws is no memory
                try:
                    found[end].append(prediction(model(**calls.inputs(ends[end]))))
                except REFUSALS:  # what it keeps does not go with this call
                    return True
    return any(
        x.shape != given[0].shape or bool((x - given[0]).norm() > _CLOSE * given[0].norm())
        for given in found
        for x in given[1:]
    )
