"""Listens to a denoiser while somebody samples with it, and keeps the calls that are wanted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ptq_tdq.calls.arguments import (
    Each,
    Odd,
    bind,
    check_argument,
    count_rows,
    find_odd,
    given_rows,
    places_of,
    split_rows,
)
from ptq_tdq.calls.calls import Calls
from ptq_tdq.errors import ModelError
from ptq_tdq.hooks import hooked
from ptq_tdq.timeaxis import TimeAxis, check_length, find_axis, time_argument, time_values

Wanted = Callable[[int], Tensor]
"""Step index -> bool [samples]: whose calls at that step are kept."""


@contextmanager
def record(model: nn.Module, *, time: str | None = None, num_train_timesteps: int | None = None) -> Iterator[Calls]:
    """Record the calls that a loop or a pipeline makes of ``model`` inside a ``with`` block.

    ``time`` names the argument that holds the time step, where it is none of the usual ones; ``num_train_timesteps``
    is the length of the scheduler's axis, where calls alone do not tell it. Outputs are left as they are: where lengths
    do not tell which arguments have a row for each sample, the model is called a few times more, on copies of its
    buffers, and of its attributes that are tensors or plain values, alone or in containers::

        with ptq_tdq.record(unet) as calls:
            pipe(prompt, num_inference_steps=20)

    Raises :class:`~ptq_tdq.errors.ModelError` for a model without a time argument, and where not the model but its
    ``forward`` was called (by other methods of its class), which nothing hears;
    :class:`~ptq_tdq.errors.TimestepError` for a length of the axis that is none.
    """
    check_length(num_train_timesteps)
    recorder = Recorder(model, time)
    calls = Calls(TimeAxis(recorder.argument))
    with recorder.listening():
        yield calls
    recorder.check_heard()
    found = recorder.calls(find_axis(recorder.argument, recorder.seen, total=num_train_timesteps))
    calls.axis, calls.groups, calls.trajectory = found.axis, found.groups, found.trajectory


class Recorder:
    """Hears of every call of a model while :meth:`listening`, and keeps copies of their arguments on the CPU.

    ``seen`` are the values of the time argument; ``step`` is the index of the present step: calls that follow each
    other with one time value (guidance in two calls) belong to one.
    """

    def __init__(self, model: nn.Module, time: str | None = None) -> None:
        _check_module(model)
        self.model, self.argument = model, time_argument(model, time)
        self.seen: set[float] = set()
        self._times: list[float] = []  # the mean of each call's
        self.step = -1
        self._wanted: Wanted | None = None
        self._on_step: Callable[[int], None] = lambda step: None
        self._samples: int | None = None  # of the trajectories that run now, where they are known
        self._first_trajectory, self._rows, self._began = 0, 0, 0
        self._parts: list[Calls] = []
        self._odd: dict[Any, Odd] = {}  # of each form of call
        self._of_samples: set[Any] = set()  # places of arguments that had a row for each of several samples
        self._looking = False
        self._passed_by = False  # whether parts of the model ran before any call of it

    @property
    def steps(self) -> list[float]:
        """The mean time value of each step of the present trajectories."""
        return [value for value, _ in groupby(self._times[self._began :])]

    def check_heard(self) -> None:
        """Raise :class:`ModelError` where the model ran and was never called as a module."""
        if self._passed_by and not self.seen:
            name = type(self.model).__name__
            raise ModelError(
                f"No call of {name} was heard, though its parts ran: its forward was called, not the module, as by "
                "another of its methods (forward_with_cfg, say); call the model itself, and write guidance around it."
            )

    def calls(self, axis: TimeAxis, recipe: dict[str, Any] | None = None) -> Calls:
        """What was recorded."""
        for part in self._parts:
            part.groups = [given_rows(group, self._of_samples) for group in part.groups]
        return Calls.join(self._parts, axis, recipe)

    @contextmanager
    def listening(self) -> Iterator[None]:
        children = (part for part in self.model.children() if not isinstance(part, torch.jit.ScriptModule))
        parts = (part.register_forward_pre_hook(self._pass_by) for part in children)
        with self.model.register_forward_pre_hook(self._hear, prepend=True, with_kwargs=True), hooked(parts):
            yield

    def begin(
        self,
        first: int | None = None,
        samples: int | None = None,
        wanted: Wanted | None = None,
        on_step: Callable[[int], None] = lambda step: None,
    ) -> None:
        """What follows are new trajectories, numbered from ``first``.

        Where it is known how many ``samples`` run at once, row i of a call belongs to sample i modulo that number
        (guidance repeats the samples); else each row is a sample. Only ``wanted`` calls are kept, by default all;
        ``on_step`` hears of each call's step.
        """
        self._first_trajectory = self._first_trajectory + self._rows if first is None else first
        self._samples, self._wanted, self._on_step = samples, wanted, on_step
        self._rows, self._began, self.step = 0, len(self._times), -1

    def _pass_by(self, *_: Any) -> None:
        self._passed_by |= not self.seen

    def _hear(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._looking:
            return
        arguments, name = bind(module, args, kwargs), self.argument
        check_argument({other: given for other, given in arguments.items() if other != name})
        values = time_values(arguments.get(name), name).float()
        value, before = float(values.mean()), self._times[self._began :]
        if self._samples is None and len(before) > 1 and value == before[0] != before[-1]:
            self.begin()  # the sampler has come back to its first step
            before = []
        if not before or value != before[-1]:
            self.step += 1
        self.seen.update(values.flatten().tolist())
        self._times.append(value)
        self._on_step(self.step)
        rows = count_rows(arguments, name)
        self._rows = max(self._rows, self._samples or rows)
        sample = torch.arange(rows) % (self._samples or rows)
        index = self._wanted(self.step)[sample].nonzero().flatten() if self._wanted else torch.arange(rows)
        if len(index):
            group = split_rows(arguments, name, self._find_odd(arguments))
            self._of_samples |= places_of(group) if rows > 1 else set()
            kept = Calls(TimeAxis(name), [group.take(index)], {}, sample[index] + self._first_trajectory)
            self._parts.append(_copied(kept))

    def _find_odd(self, arguments: dict[str, Any]) -> Odd:
        leaves, spec = pytree.tree_flatten(arguments)
        form = (str(spec), tuple(tuple(x.shape) if isinstance(x, Tensor) else None for x in leaves))
        if form not in self._odd:
            self._looking = True
            try:
                self._odd[form] = find_odd(self.model, arguments, self.argument)
            finally:
                self._looking = False
        return self._odd[form]


def _check_module(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"A {type(model).__name__} is no module whose calls can be recorded; pass the denoiser itself."
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError("The denoiser is TorchScript, which hides its layers; record the module that it was made of.")


def _copied(calls: Calls) -> Calls:
    """On the CPU, and in memory that the sampler cannot write to."""

    def copied(leaf: Any) -> Any:
        if isinstance(leaf, Each):
            return Each(tuple(map(copied, leaf.items)))
        return leaf.detach().to("cpu", copy=True) if isinstance(leaf, Tensor) else leaf

    for group in calls.groups:
        group.tree, group.rows = pytree.tree_map(copied, group.tree), [copied(leaf) for leaf in group.rows]
    return calls
