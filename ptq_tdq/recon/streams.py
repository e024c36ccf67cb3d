"""Carries the full-precision and the quantized stream from unit to unit, so that the model runs once per phase.

The calibration set is cut into chunks. A ``Lane`` is one forward pass of the model over one chunk, in a coroutine
(greenlet) that pauses whenever the model calls a reconstruction unit. When all lanes wait at the same unit, its inputs
are merged, the caller learns the unit and computes its outputs, and the lanes go on with these. So any model whose
forward pass is ordinary Python can be swept, and what is alive is only what the model itself still needs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn
from torch._C import _len_torch_function_stack
from torch.overrides import _pop_mode, _push_mode
from torch.utils import _pytree as pytree

from ptq_tdq.calls import Calls
from ptq_tdq.errors import ModelError


Layout = tuple[int | None, ...]
"""For each leaf of a tree: how many rows it has for one sample, or None for what all samples share."""


@dataclass(frozen=True)
class UnitCall:
    """A call of a unit: its arguments (args, kwargs) as a flat tree; by one lane, or merged over all samples."""

    unit: str
    leaves: tuple[Any, ...]
    spec: pytree.TreeSpec
    layout: Layout

    def take(self, index: Tensor | slice) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """args and kwargs for some samples."""
        found = [leaf if k is None else leaf[rows_of(index, k)] for leaf, k in zip(self.leaves, self.layout, strict=True)]
        arguments: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_unflatten(found, self.spec)
        return arguments


@dataclass(frozen=True)
class Outputs:
    """What a unit gives for all samples, as a flat tree."""

    leaves: tuple[Any, ...]
    spec: pytree.TreeSpec
    layout: Layout

    def split(self, samples: Sequence[int]) -> list[Any]:
        """The outputs of consecutive chunks of so many samples."""
        stops = list(accumulate(samples))
        return [self[slice(stop - n, stop)] for stop, n in zip(stops, samples, strict=True)]

    def __getitem__(self, index: Tensor | slice) -> Any:
        found = [leaf if k is None else leaf[rows_of(index, k)] for leaf, k in zip(self.leaves, self.layout, strict=True)]
        return pytree.tree_unflatten(found, self.spec)

    def rows(self, index: Tensor | slice) -> list[Tensor]:
        """The real-valued tensors with rows, for some samples."""
        return [
            leaf[rows_of(index, k)]
            for leaf, k in zip(self.leaves, self.layout, strict=True)
            if k is not None and leaf.is_floating_point()
        ]


def rows_of(index: Tensor | slice, k: int) -> Tensor | slice:
    """The rows of some samples in a tensor that has ``k`` for each, one sample after the other."""
    if k == 1:
        return index
    if isinstance(index, slice):
        return slice(index.start * k, index.stop * k)
    return (index[:, None] * k + torch.arange(k, device=index.device)).flatten()


def layouts(model: nn.Module, units: Sequence[str], calls: Calls) -> dict[str, tuple[Layout, Layout]]:
    """For each unit the layouts of its arguments and of its outputs, from a call with one sample and one with two."""
    seen: list[dict[str, tuple[list[Any], list[Any]]]] = []
    for index in (torch.tensor([0]), torch.tensor([0, 0])):
        found: dict[str, tuple[list[Any], list[Any]]] = {}

        def hear(
            module: nn.Module, args: Any, kwargs: Any, output: Any, name: str = "", found: Any = found
        ) -> None:
            sizes = (_sizes((args, kwargs)), _sizes(output))
            found.setdefault(name, sizes)

        handles = [
            model.get_submodule(name).register_forward_hook(partial(hear, name=name), with_kwargs=True)
            for name in units
        ]
        try:
            with torch.no_grad():
                model(**calls.inputs(index))
        finally:
            for handle in handles:
                handle.remove()
        seen.append(found)
    one, two = seen
    return {name: (_layout(one[name][0], two[name][0]), _layout(one[name][1], two[name][1])) for name in units}


def _sizes(tree: Any) -> list[Any]:
    return [len(leaf) if isinstance(leaf, Tensor) and leaf.ndim else None for leaf in pytree.tree_leaves(tree)]


def _layout(one: list[Any], two: list[Any]) -> Layout:
    return tuple(a if a and b == 2 * a else None for a, b in zip(one, two, strict=True))


def merge(calls: Sequence[UnitCall], store: Callable[[Sequence[Tensor]], Tensor]) -> UnitCall:
    """The calls of all chunks as one: what has rows is joined, what all share is taken from the first."""
    first = calls[0]
    leaves = list(first.leaves)
    for i, k in enumerate(first.layout):
        if k is not None:
            parts = [call.leaves[i] for call in calls]
            if len({part.shape[1:] for part in parts}) > 1:
                raise ModelError(
                    f"{first.unit} gets tensors of different sizes from different calls; record calls of one size "
                    "(one height and width, prompts padded to one length)."
                )
            leaves[i] = store(parts)
    return UnitCall(first.unit, tuple(leaves), first.spec, first.layout)


class Lane(greenlet):  # type: ignore[misc]
    """One forward pass, paused at each unit: ``resume()`` gives the next :class:`UnitCall`, None at the end."""

    def __init__(self, forward: Callable[[], Any]) -> None:
        super().__init__()
        self._forward = forward

    def run(self, _: None = None) -> None:
        self._forward()

    def pause(self, call: UnitCall) -> Any:
        # torch's function modes (attention products listen by one) are a stack of the thread, not of this coroutine
        modes = [_pop_mode() for _ in range(_len_torch_function_stack())]
        try:
            return self.parent.switch(call)
        finally:
            for mode in reversed(modes):
                _push_mode(mode)

    def resume(self, output: Any = None) -> UnitCall | None:
        call: UnitCall | None = self.switch(output)
        return call


@contextmanager
def intercepted(model: nn.Module, units: Mapping[str, tuple[Layout, Layout]]) -> Iterator[None]:
    """While open, calls of ``units`` that come from a lane pause it; all other calls run as always."""

    def intercept(name: str, module: nn.Module) -> None:
        original = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            lane = getcurrent()
            if not isinstance(lane, Lane):
                return original(*args, **kwargs)
            leaves, spec = pytree.tree_flatten((args, kwargs))
            return lane.pause(UnitCall(name, tuple(leaves), spec, units[name][0]))

        module.forward = forward

    modules = {name: model.get_submodule(name) for name in units}
    for name, module in modules.items():
        intercept(name, module)
    try:
        yield
    finally:
        for module in modules.values():
            del module.forward


class Store:
    """Concatenates chunks in memory or, with ``on_disk``, in unlinked memory-mapped files that the system pages out."""

    def __init__(self, on_disk: bool) -> None:
        self.on_disk = on_disk

    def __call__(self, chunks: Sequence[Tensor]) -> Tensor:
        if not self.on_disk:
            return torch.cat(list(chunks))
        whole = self.empty((sum(len(c) for c in chunks), *chunks[0].shape[1:]), chunks[0].dtype)
        start = 0
        for chunk in chunks:
            whole[start : start + len(chunk)] = chunk
            start += len(chunk)
        return whole

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor where this store keeps them."""
        if not self.on_disk:
            return torch.empty(shape, dtype=dtype)
        with tempfile.NamedTemporaryFile(prefix="ptq-tdq-", delete=False) as file:
            path = Path(file.name)
        try:
            size = torch.Size(shape).numel()
            return torch.from_file(str(path), shared=True, size=size, dtype=dtype).view(shape)
        finally:
            path.unlink()


Process = Callable[[UnitCall, UnitCall], tuple[Outputs, Outputs]]


def sweep(
    model: nn.Module,
    units: Mapping[str, tuple[Layout, Layout]],
    forwards: Sequence[Callable[[], Any]],
    sizes: Sequence[int],
    store: Store,
    process: Process,
) -> None:
    """Run both streams through the model.

    ``units`` are the units' names with their layouts, ``forwards`` run the model over one chunk each, ``sizes`` are the
    chunks' numbers of samples. For each call of a unit, ``process(full_precision_call, quantized_call)`` gets the
    merged calls and returns both outputs.
    """
    with intercepted(model, units), torch.no_grad():
        lanes = [Lane(forward) for forward in (*forwards, *forwards)]
        calls = [lane.resume() for lane in lanes]
        while present := [c for c in calls if c is not None]:
            names = {c.unit for c in present}
            if len(present) < len(lanes) or len(names) > 1:
                raise ModelError(
                    f"The model's forward pass takes different ways for different samples (at {sorted(names)})."
                )
            count = len(present) // 2
            full, quantized = (merge(half, store) for half in (present[:count], present[count:]))
            calls = [None] * len(lanes)
            present.clear()
            outputs = process(full, quantized)
            del full, quantized
            chunks = [chunk for output in outputs for chunk in output.split(sizes)]
            del outputs
            for i, lane in enumerate(lanes):
                calls[i] = lane.resume(chunks[i])
                chunks[i] = None
