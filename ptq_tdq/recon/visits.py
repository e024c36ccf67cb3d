"""What the layers of a unit are given, one after the other, while each is rounded before the next one is looked at.

A run of the unit over a batch waits, in a coroutine as in :mod:`ptq_tdq.recon.streams`, at the layer whose turn it is:
the unit runs once for all its layers. Where no more samples may wait, the others run from the beginning for each layer;
so do those whose run does not come by the layers in their order.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import copy_context
from functools import partial
from typing import Any

import torch
from greenlet import getcurrent
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ptq_tdq import processes
from ptq_tdq.calls.arguments import REFUSALS
from ptq_tdq.hooks import hooked
from ptq_tdq.modules import QuantLayer
from ptq_tdq.modules.layers import layer_input
from ptq_tdq.recon.parts import Parts
from ptq_tdq.recon.streams import Coroutine, UnitCall
from ptq_tdq.recon.unit import Unit
from ptq_tdq.wrap import switched


class _Reached(Exception):
    """The layer's input is known; the rest of the unit need not run."""


class _Visit(Coroutine):
    """A run of a unit over one batch, which waits at layers; ``valid`` while it comes by these in their order."""

    def __init__(self, unit: Unit, call: UnitCall, batch: slice | Tensor) -> None:
        super().__init__(partial(unit.run, call, batch))
        self.gr_context = copy_context()
        self.wanted: nn.Module | None = None
        self.valid = True

    def input(self, layer: QuantLayer | None) -> Tensor | None:
        """Go on to a layer and give its input; None where the run has ended without it."""
        self.wanted = layer
        found: Tensor | None = self.resume() if not self.dead else None
        return found


class Visits:
    """Runs of a unit, in both streams, that wait at its layers; see :func:`visiting`."""

    def __init__(self, unit: Unit, full: UnitCall, mine: UnitCall) -> None:
        self.unit, self.full, self.mine = unit, full, mine
        self.groups = _same_input(unit, mine)
        self.waiting: dict[int, tuple[_Visit, _Visit]] = {}  # by the first sample: quantized, in full precision
        room = unit.waiting if len(self.groups) > 1 else 0
        for batch in unit.batches():
            room -= len(unit.t[batch])
            if room < 0:
                break
            self.waiting[_first(batch)] = _Visit(unit, mine, batch), _Visit(unit, full, batch)
        self.undisturbed: bool | None = None if self.waiting else True  # what the first run to end tells

    def inputs(self, layer: QuantLayer, batch: slice | Tensor) -> tuple[Tensor | None, Tensor | None]:
        """What the layer is given in the quantized stream and in the other; None where the unit does not call it."""
        mine, full = self.waiting.get(_first(batch), (None, None))
        with torch.no_grad():
            found = self._next(mine, layer, self.mine, batch)
            with switched(self.unit.module, weights=False, activations=False):
                return found, self._next(full, layer, self.full, batch)

    def _next(self, visit: _Visit | None, layer: QuantLayer, call: UnitCall, batch: slice | Tensor) -> Tensor | None:
        """What a layer is given in the run that waits, or else in one from the beginning."""
        if visit is not None:
            with self._noticing(visit):
                if (found := visit.input(layer)) is not None:
                    return found
        found = self.input(layer, call, batch)
        if visit is not None and found is not None:
            visit.valid = False  # the layer was not rounded yet when it came by
        return found

    @contextmanager
    def _noticing(self, visit: _Visit) -> Iterator[None]:
        """Errors of a run that waits are those of runs that disturb each other: what is wrong otherwise shows again."""
        try:
            yield
        except REFUSALS:
            self.undisturbed = visit.valid = False

    def input(self, layer: QuantLayer, call: UnitCall, batch: slice | Tensor) -> Tensor | None:
        """What a layer is given when the unit runs from the beginning."""
        found: list[Tensor] = []

        def stop(module: nn.Module, args: Any, kwargs: Any) -> None:
            x = layer_input(args, kwargs)
            assert x is not None
            found.append(x)
            raise _Reached

        with suppress(_Reached), torch.no_grad(), layer.register_forward_pre_hook(stop, with_kwargs=True):
            self.unit.run(call, batch)
        return found[0] if found else None

    def outputs(self) -> Parts | None:
        """What the unit gives in the quantized stream, now that all its layers are rounded; nothing of some samples.

        None where runs that take turns have disturbed each other, as those of modules that keep something in themselves
        while they run: the inputs were not what they should have been.
        """
        if self.unit.among is None:
            found = self.unit.outputs(self.mine, self._output)
        else:
            found = Parts(())
            with torch.no_grad():
                for batch in self.unit.batches():
                    if self.undisturbed is None:
                        self._output(batch)
        return found if all(processes.gather([bool(self.undisturbed)])) else None

    def _output(self, batch: slice | Tensor) -> Any:
        """What the unit gives for a batch."""
        visit = self.waiting.get(_first(batch), (None,))[0]
        if visit is not None:
            with self._noticing(visit):
                visit.input(None)
            self.end(_first(batch))
        if visit is None or not visit.valid:
            return self.unit.run(self.mine, batch)
        if self.undisturbed is None:
            self.undisturbed = _same(visit.output, self.unit.run(self.mine, batch))
        return visit.output

    def end(self, first: int) -> None:
        """Let the runs of a batch wait no longer."""
        for visit in self.waiting.pop(first):
            if not visit.dead:
                visit.throw()


@contextmanager
def visiting(unit: Unit, full: UnitCall, mine: UnitCall) -> Iterator[Visits]:
    """Around the rounding of the unit's layers, group by group; the runs that still wait end with it."""

    def on_call(layer: nn.Module, args: Any, kwargs: Any) -> None:
        visit = getcurrent()
        if isinstance(visit, _Visit) and visit.wanted is layer:
            visit.wanted = None
            visit.pause(layer_input(args, kwargs))

    visits = Visits(unit, full, mine)
    with hooked(layer.register_forward_pre_hook(on_call, with_kwargs=True) for layer in unit.layers()):
        try:
            yield visits
        finally:
            for first in list(visits.waiting):
                visits.end(first)


def _same_input(unit: Unit, call: UnitCall) -> list[list[QuantLayer]]:
    """The unit's layers as it calls them, those that are given the very same tensor together (q, k and v)."""
    layers, seen = unit.layers(), dict[QuantLayer, tuple[Tensor, int]]()

    def on_call(layer: nn.Module, args: Any, kwargs: Any) -> None:
        x = layer_input(args, kwargs)
        assert x is not None and isinstance(layer, QuantLayer)
        seen.setdefault(layer, (x, x._version))

    with torch.no_grad(), hooked(layer.register_forward_pre_hook(on_call, with_kwargs=True) for layer in layers):
        unit.run(call, call.arguments.first())
    groups: list[list[int]] = []  # of their numbers
    last = None
    for layer in [*seen, *(layer for layer in layers if layer not in seen)]:
        mine = seen.get(layer)
        if mine and last and mine[0] is last[0] and mine[1] == last[1]:
            groups[-1].append(layers.index(layer))
        else:
            groups.append([layers.index(layer)])
        last = mine
    return [[layers[number] for number in group] for group in processes.of_first(lambda: groups)]


def _first(batch: slice | Tensor) -> int:
    return int(batch.start if isinstance(batch, slice) else batch[0])


def _same(a: Any, b: Any) -> bool:
    ours, theirs = ([x for x in pytree.tree_leaves(tree) if isinstance(x, Tensor)] for tree in (a, b))
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))
