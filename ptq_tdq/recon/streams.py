"""Carries the full-precision and the quantized stream from unit to unit, so that the model runs once per phase.

The calibration set is cut into chunks. A ``Lane`` is one forward pass of the model over one chunk, in a coroutine
(greenlet) that pauses whenever the model calls a reconstruction unit. When all lanes wait at the same unit, its inputs
are merged, the caller learns the unit and computes its outputs, and the lanes go on with these. So any model whose
forward pass is ordinary Python can be swept, and what is alive is only what the model itself still needs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from ptq_tdq.errors import ModelError


@dataclass(frozen=True)
class UnitCall:
    """A call of a unit: by one lane over its chunk, or merged over all samples [N, ...]."""

    unit: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def map(self, change: Callable[[Tensor], Tensor]) -> UnitCall:
        """The same call with each tensor argument replaced."""

        def each(value: Any) -> Any:
            return change(value) if isinstance(value, Tensor) else value

        return UnitCall(self.unit, tuple(map(each, self.args)), {k: each(v) for k, v in self.kwargs.items()})


def merge(calls: Sequence[UnitCall], sizes: Sequence[int], store: Callable[[Sequence[Tensor]], Tensor]) -> UnitCall:
    """The calls of all chunks as one; tensors are concatenated along the samples, anything else must not differ."""
    first = calls[0]

    def together(values: list[Any]) -> Any:
        if not isinstance(values[0], Tensor):
            return values[0]
        if [len(v) for v in values] != list(sizes):
            raise ModelError(f"{first.unit} gets a tensor without one row per sample; skip its layers.")
        return store(values)

    args = tuple(together([c.args[i] for c in calls]) for i in range(len(first.args)))
    return UnitCall(first.unit, args, {key: together([c.kwargs[key] for c in calls]) for key in first.kwargs})


class Lane(greenlet):  # type: ignore[misc]
    """One forward pass, paused at each unit: ``resume()`` gives the next :class:`UnitCall`, None at the end."""

    def __init__(self, forward: Callable[[], Any]) -> None:
        super().__init__()
        self._forward = forward

    def run(self, _: None = None) -> None:
        self._forward()

    def pause(self, call: UnitCall) -> Tensor:
        output: Tensor = self.parent.switch(call)
        return output

    def resume(self, output: Tensor | None = None) -> UnitCall | None:
        call: UnitCall | None = self.switch(output)
        return call


@contextmanager
def intercepted(model: nn.Module, units: Sequence[str]) -> Iterator[None]:
    """While open, calls of ``units`` that come from a lane pause it; all other calls run as always."""

    def intercept(name: str, module: nn.Module) -> None:
        original = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            lane = getcurrent()
            return lane.pause(UnitCall(name, args, kwargs)) if isinstance(lane, Lane) else original(*args, **kwargs)

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


Process = Callable[[UnitCall, UnitCall], tuple[Tensor, Tensor]]


def sweep(
    model: nn.Module,
    units: Sequence[str],
    forwards: Sequence[Callable[[], Any]],
    sizes: Sequence[int],
    store: Store,
    process: Process,
) -> None:
    """Run both streams through the model.

    ``forwards`` run the model over one chunk each, ``sizes`` are the chunks' numbers of samples. For each unit,
    ``process(full_precision_call, quantized_call)`` gets the merged calls and returns both outputs [N, ...].
    """
    with intercepted(model, units), torch.no_grad():
        lanes = [Lane(forward) for forward in (*forwards, *forwards)]
        calls = [lane.resume() for lane in lanes]
        done: set[str] = set()
        while present := [c for c in calls if c is not None]:
            names = {c.unit for c in present}
            if len(present) < len(lanes) or len(names) > 1:
                raise ModelError(
                    f"The model's forward pass takes different ways for different samples (at {sorted(names)})."
                )
            if names & done:
                raise ModelError(f"The model calls {names.pop()} twice in one forward pass; skip its layers.")
            done |= names
            count = len(present) // 2
            full, quantized = (merge(half, sizes, store) for half in (present[:count], present[count:]))
            calls = [None] * len(lanes)
            present.clear()
            outputs = process(full, quantized)
            del full, quantized
            chunks = [chunk for output in outputs for chunk in output.split(list(sizes))]
            del outputs
            for i, lane in enumerate(lanes):
                calls[i] = lane.resume(chunks[i])
                chunks[i] = torch.empty(0)
