"""Hooks of modules that are there for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """While open, the hooks of these ``handles`` are there."""
    with ExitStack() as stack:
        for handle in handles:
            stack.enter_context(handle)
        yield


def first_where(
    modules: Iterable[tuple[str, nn.Module]], bad: Callable[[Any], bool], run: Callable[[], Any]
) -> str | None:
    """The name of the first module whose output is ``bad`` in a run, if there is one."""
    found: list[str] = []

    def look(name: str, module: nn.Module, args: Any, output: Any) -> None:
        if bad(output):
            found.append(name)

    with torch.no_grad(), hooked(module.register_forward_hook(partial(look, name)) for name, module in modules):
        run()
    return found[0] if found else None
