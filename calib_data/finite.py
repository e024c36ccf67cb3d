"""Notices a denoiser that gives NaN or Inf while somebody samples with it, and finds the layer where that began."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ptq_tdq.calls import bind, tensors_of
from ptq_tdq.errors import NonFiniteError
from ptq_tdq.hooks import first_where
from ptq_tdq.timeaxis import time_argument, time_values


@contextmanager
def finite_outputs(model: nn.Module) -> Iterator[None]:
    """Raise :class:`NonFiniteError` naming the layer and the model's own time value, in place of a broken output."""
    name = time_argument(model)
    looking = False

    def check(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        nonlocal looking
        if looking or _finite(output):
            return
        looking = True
        t = float(time_values(bind(module, args, kwargs).get(name), name).float().mean())
        raise NonFiniteError(
            f"The denoiser gave NaN or Inf at {name} = {t:g}{_first_layer(module, args, kwargs)}; "
            "check its weights and dtype."
        )

    with model.register_forward_hook(check, with_kwargs=True):
        yield


def _finite(output: Any) -> bool:
    return all(bool(torch.isfinite(x).all()) for x in tensors_of(output) if x.is_floating_point())


def _first_layer(model: nn.Module, args: Any, kwargs: Any) -> str:
    """Name the layer whose output was the first to have NaN or Inf, as a part of a sentence; empty if none had."""
    leaves = [(name, m) for name, m in model.named_modules() if name and not any(m.children())]
    found = first_where(leaves, lambda output: not _finite(output), lambda: model(*args, **kwargs))
    return f", first in {found}" if found else ""
