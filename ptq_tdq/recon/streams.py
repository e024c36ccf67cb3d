"""Carries the full-precision and the quantized stream from unit to unit, so that the model runs once per phase.

The calibration set is cut into chunks. A ``Lane`` is one forward pass of the model over one chunk, in a coroutine
(greenlet) that pauses whenever the model calls a reconstruction unit. When all lanes wait at the same unit, its inputs
are merged, the caller learns the unit and computes its outputs, and the lanes go on with these. So any model whose
forward pass is ordinary Python can be swept, and what is alive is only what the model itself still needs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn
from torch._C import _len_torch_function_stack
from torch.backends import cuda as backends
from torch.overrides import _pop_mode, _push_mode
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from ptq_tdq import processes
from ptq_tdq.calls import Calls
from ptq_tdq.errors import ModelError
from ptq_tdq.hooks import hooked
from ptq_tdq.recon.parts import ABSENT, Layout, Part, Parts, Place, Store, spans

Layouts = dict[str, list[tuple[Layout, Layout]]]
"""By unit: how its arguments and its outputs hold rows, for each time that one forward pass calls it."""


def layouts(model: nn.Module, units: Sequence[str], calls: Calls) -> list[Layouts]:
    """The layouts of each group of calls, from a call with one sample and one with that sample twice."""
    found = []
    for _, span in calls.spans():
        one, two = (_shapes(model, units, calls.inputs(torch.tensor([span.start] * n))) for n in (1, 2))
        found.append({unit: list(map(_layout_pair, one[unit], two.get(unit, ()))) for unit in one})
    return found


Autocast = dict[str, tuple[bool, torch.dtype]]
"""By kind of device: whether it is on, and to which dtype."""
Shapes = list[torch.Size | None]
SEVERAL = 8  # samples whose values are likely to differ in what they decide


def _shapes(
    model: nn.Module, units: Sequence[str], arguments: dict[str, Any]
) -> dict[str, list[tuple[Shapes, Shapes]]]:
    """Shapes of the leaves of each unit's (arguments, outputs), one entry per call of the unit."""
    found: dict[str, list[tuple[Shapes, Shapes]]] = {}

    def of(tree: Any) -> Shapes:
        return [leaf.shape if isinstance(leaf, Tensor) else None for leaf in pytree.tree_leaves(tree)]

    def on_call(module: nn.Module, args: Any, kwargs: Any, output: Any, *, name: str) -> None:
        found.setdefault(name, []).append((of((args, kwargs)), of(output)))

    with hooked(_on_calls(model, units, on_call)), torch.no_grad():
        model(**arguments)
    return found


def rehearse(model: nn.Module, units: Sequence[str], calls: Calls) -> None:
    """Run a few samples of each group, whose rows are to lie where the layouts say, before any unit is learned.

    Raises :class:`ModelError` where values decide how many rows there are, as :meth:`Part.of` does.
    """
    for (_, span), known in zip(calls.spans(), layouts(model, units, calls), strict=True):
        numbers = torch.linspace(span.start, span.stop - 1, min(SEVERAL, span.stop - span.start)).long()
        with hooked(_on_calls(model, units, partial(_check, known, Counter(), len(numbers)))), torch.no_grad():
            model(**calls.inputs(numbers))


def _check(
    known: Layouts, seen: Counter[str], count: int, _: nn.Module, args: Any, kwargs: Any, output: Any, *, name: str
) -> None:
    inputs, outputs = _layout_of(known, name, seen[name])
    seen[name] += 1
    Part.of((args, kwargs), slice(0, count), inputs)
    Part.of(output, slice(0, count), outputs)


def _on_calls(model: nn.Module, units: Sequence[str], hook: Callable[..., None]) -> Iterator[RemovableHandle]:
    """``hook`` with the name of its unit at each of them."""
    for name in units:
        yield model.get_submodule(name).register_forward_hook(partial(hook, name=name), with_kwargs=True)


def _layout_of(known: Layouts, unit: str, number: int) -> tuple[Layout, Layout]:
    """That of the arguments and the outputs of a unit when it is called after so many times; empty where none is."""
    found = known.get(unit, [])
    return found[min(number, len(found) - 1)] if found else ((), ())


def _layout_pair(one: tuple[Shapes, Shapes], two: tuple[Shapes, Shapes]) -> tuple[Layout, Layout]:
    inputs, outputs = (tuple(map(_place, *pair)) for pair in zip(one, two, strict=True))
    return inputs, outputs


def _place(one: torch.Size | None, two: torch.Size | None) -> Place | None:
    """The first dimension that is twice as long for two samples, or longer at all."""
    if one is None or two is None:
        return ABSENT
    sizes = list(enumerate(zip(one, two, strict=False)))
    places = [Place(dim, a) for dim, (a, b) in sizes if a and b == 2 * a]
    places += [Place(dim, b - a, 2 * a - b) for dim, (a, b) in sizes if a < b < 2 * a]
    return next(iter(places), None)


@dataclass(frozen=True, eq=False)
class UnitCall:
    """One call of a unit, by one lane or merged over all: arguments (args, kwargs), how outputs will hold rows, and the
    autocast that the model computes in there.
    """

    unit: str
    arguments: Parts
    outputs: tuple[Layout, ...]  # of each part
    autocast: Autocast = field(default_factory=dict)

    @property
    def spans(self) -> tuple[slice, ...]:
        """The samples that may run together, those of other processes too."""
        return spans(processes.gather([part.form() for part in self.arguments.parts]))

    def output(self, tree: Any, index: slice | Tensor) -> Part:
        """What the unit gave for some samples; the part counts them from 0."""
        part = self.arguments.of(index)
        layout = self.outputs[self.arguments.parts.index(part)]
        count = index.stop - index.start if isinstance(index, slice) else len(index)
        return Part.of(tree, slice(0, count), layout)


class Coroutine(greenlet):  # type: ignore[misc]
    """A run of ``forward`` that pauses: ``resume()`` goes on to the next pause and gives what it is left with there.

    None at the end; ``output`` is then what it has given. Each side has its own of what torch is set to: gradients,
    autocast, the kernels that attention may use, and the stack of function modes (attention products listen by one), of
    which a pause takes off what lies on it since this one went on.
    """

    output: Any = None

    def __init__(self, forward: Callable[[], Any]) -> None:
        super().__init__()
        self._forward = forward

    def run(self, _: None = None) -> None:
        self._enter()
        try:
            self.output = self._forward()
        finally:  # it may have been ended at a pause, too
            _set(self.outside)

    def _enter(self) -> None:
        self.outside, self.depth = _settings(), _len_torch_function_stack()

    def pause(self, given: Any) -> Any:
        own, modes = _settings(), [_pop_mode() for _ in range(_len_torch_function_stack() - self.depth)]
        _set(self.outside)
        try:
            return self.parent.switch(given)
        finally:
            self._enter()
            _set(own)
            for mode in reversed(modes):
                _push_mode(mode)

    def resume(self, answer: Any = None) -> Any:
        return self.switch(answer)


class _Settings(NamedTuple):
    """Whether there are gradients, autocast by kind of device, and what attention may be computed by."""

    gradients: bool
    autocast: Autocast
    attention: tuple[bool, ...]


_KERNELS = [
    (getattr(backends, f"{kind}_sdp_enabled"), getattr(backends, f"enable_{kind}_sdp"))
    for kind in ("flash", "mem_efficient", "math", "cudnn")
]


def _settings() -> _Settings:
    found = torch.accelerator.current_accelerator()
    kinds = {"cpu", "cpu" if found is None else found.type}
    autocast = {kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds}
    return _Settings(torch.is_grad_enabled(), autocast, tuple(enabled() for enabled, _ in _KERNELS))


def _set(settings: _Settings) -> None:
    torch.set_grad_enabled(settings.gradients)
    for kind, (enabled, dtype) in settings.autocast.items():
        torch.set_autocast_enabled(kind, enabled)
        torch.set_autocast_dtype(kind, dtype)
    for (_, enable), enabled in zip(_KERNELS, settings.attention, strict=True):
        enable(enabled)


class Lane(Coroutine):
    """One forward pass over ``samples``, paused at each unit: ``resume()`` gives the next call."""

    def __init__(self, forward: Callable[[], Any], samples: slice, layouts: Layouts) -> None:
        super().__init__(forward)
        self.samples, self.layouts = samples, layouts
        self.seen: Counter[str] = Counter()

    def call(self, unit: str, args: Any, kwargs: Any) -> Any:
        """Pause at a call of a unit; returns the unit's output."""
        inputs, outputs = _layout_of(self.layouts, unit, self.seen[unit])
        self.seen[unit] += 1
        arguments, autocast = Parts((Part.of((args, kwargs), self.samples, inputs),)), _settings().autocast
        return self.pause(UnitCall(unit, arguments, (outputs,), autocast))


@contextmanager
def intercepted(model: nn.Module, units: Sequence[str]) -> Iterator[None]:
    """While open, calls of ``units`` that come from a lane pause it; all other calls run as always."""

    def intercept(name: str, module: nn.Module) -> None:
        original = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            lane = getcurrent()
            return lane.call(name, args, kwargs) if isinstance(lane, Lane) else original(*args, **kwargs)

        module.forward = forward

    modules = {name: model.get_submodule(name) for name in units}
    for name, module in modules.items():
        intercept(name, module)
    try:
        yield
    finally:
        for module in modules.values():
            del module.forward


def merge(calls: Sequence[UnitCall], store: Store) -> UnitCall:
    """The calls of all chunks as one."""
    given = [(call.arguments.parts[0], call.outputs[0]) for call in calls]
    parts, layouts = [], []
    for span in spans([part.form() for part, _ in given]):
        some = [pair for pair in given if span.start <= pair[0].samples.start < span.stop]
        parts.append(Part.join([part for part, _ in some], store))
        layouts.append(some[0][1])
    return UnitCall(calls[0].unit, Parts(tuple(parts)), tuple(layouts), calls[0].autocast)


Process = Callable[[UnitCall, UnitCall], tuple[Parts, Parts]]
Chunk = tuple[Callable[[], Any], slice, Layouts]
"""What runs the model over some samples, which samples, and the layouts of their group."""


def sweep(model: nn.Module, units: Sequence[str], chunks: Sequence[Chunk], store: Store, process: Process) -> None:
    """Run both streams through the model.

    For each call of a unit, ``process(full_precision_call, quantized_call)`` gets the merged calls and returns both
    outputs.
    """
    with intercepted(model, units), torch.no_grad():
        lanes = [Lane(*chunk) for chunk in (*chunks, *chunks)]
        calls = [lane.resume() for lane in lanes]
        while (names := set(processes.gather([call.unit if call else None for call in calls]))) != {None}:
            if len(names) > 1:
                raise ModelError(
                    "The model's forward pass takes different ways for different samples "
                    f"(at {', '.join(sorted(filter(None, names)))}); record calls that all take the same one, without "
                    "arguments that leave layers out in some of them."
                )
            present, count = list(filter(None, calls)), len(chunks)
            full, quantized = (merge(half, store) for half in (present[:count], present[count:]))
            calls = [None] * len(lanes)
            present.clear()
            outputs = process(full, quantized)
            del full, quantized
            pieces = [output[samples] for output in outputs for _, samples, _ in chunks]
            del outputs
            for i, lane in enumerate(lanes):
                calls[i] = lane.resume(pieces[i])
                pieces[i] = None
