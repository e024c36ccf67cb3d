"""The time step t: the axis of the interval tables, and how each sample's t reaches the quantizers.

t is the scheduler's training time, 0..T, integer or fractional (Euler, DPM-Solver, flow matching). It comes from the
model's own time argument and is the only key of a table: never a call counter or a position in a schedule.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from functools import lru_cache
from inspect import Parameter, Signature
from itertools import pairwise
from reprlib import repr as shortened
from types import FunctionType, MappingProxyType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ptq_tdq.compiled import uncompiled
from ptq_tdq.errors import ModelError, TimestepError

USUAL_NAMES = ("timestep", "timesteps", "t", "time", "time_step", "sigma", "noise_labels", "r")
USUAL_LENGTH = 1000  # training steps of nearly every scheduler
LONGEST = 1_000_000  # as the schema of an artifact says too
LARGEST = 1 << 53  # of its numbers: floating point has all integers so far
NEAR = 2e-3  # a t so close to a whole number is that number: t / 1000 * 1000 in float32 is not exact
LOOSE = 4e-3  # relative error of a time value in bfloat16
FINE = 1 / 8  # of the axis: values that are no whole numbers and stay below tell too few entries of a table apart
APART = 2  # training steps, at least, between such values of a run that began late
FEW = 32  # training steps, below which values that lie between them need entries of their own
ROOM = 1 / 8  # of the values' range: what a stretched axis has at each end for runs with other numbers of steps


@dataclass(frozen=True)
class TimeAxis:
    """How a model's time argument becomes the scheduler's time step: ``t = scale * value + offset`` in [0, T].

    T is ``num_train_timesteps``. A table has T + 1 entries: flow matching starts at t = T itself.
    """

    argument: str
    num_train_timesteps: int = USUAL_LENGTH
    scale: float = 1.0
    offset: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> TimeAxis:
        """Inverse of :meth:`to_dict`, also after a trip through JSON; raises TypeError or ValueError for other data."""
        axis = cls(**data)
        numbers = axis.num_train_timesteps, axis.scale, axis.offset
        if not isinstance(axis.argument, str) or any(type(x) not in (int, float) for x in numbers):
            raise TypeError("a time axis is a name and three numbers")
        if any(not abs(x) <= LARGEST for x in numbers) or not axis.scale:
            raise ValueError("a time axis has a finite scale other than 0")
        if int(numbers[0]) != numbers[0] or not 1 <= numbers[0] <= LONGEST:
            raise ValueError(f"a time axis is 1 to {LONGEST:,} steps long")
        return axis

    @property
    def length(self) -> int:
        """Entries of a table."""
        return self.num_train_timesteps + 1

    def t(self, value: Any) -> Tensor:
        """Time argument -> t float32, [1] for one that all rows share, else [B].

        Raises :class:`TimestepError` for what is no number or outside [0, T].
        """
        values = time_values(value, self.argument).float()
        t = values * self.scale + self.offset
        nearest = t.round()
        t = torch.where((t - nearest).abs() < NEAR, nearest, t)
        if t.is_cuda and torch.cuda.is_current_stream_capturing():  # a CUDA graph: nothing can be asked of the device
            return t
        inside = (t >= 0) & (t <= self.num_train_timesteps)
        if not bool(inside.all()):
            ends = self.value(torch.tensor([0.0, self.num_train_timesteps])) + 0.0  # not -0
            raise TimestepError(
                f"The interval tables cover the time steps 0 to {self.num_train_timesteps}. "
                f"Got t = {t[~inside][0].item():g}; the model was called with {self.argument} = "
                f"{values[~inside][0].item():g}, which is not between {ends.min().item():g} and {ends.max().item():g}: "
                "sample with a scheduler that gives such values, or calibrate with this one."
            )
        return t

    def value(self, t: Tensor) -> Tensor:
        """Inverse of :meth:`t`: what the model is given at t."""
        return (t - self.offset) / self.scale


def time_values(value: Any, name: str) -> Tensor:
    """A time argument as a tensor [1] or [B]; a time per token [B, L] becomes the largest of each row.

    Raises :class:`TimestepError` for what is no finite number.
    """
    if value is None or isinstance(value, str | bool | list | tuple):
        raise TimestepError(
            f"The model was called with {name} = {shortened(value)}; pass a time step, or a tensor with one per sample."
        )
    try:
        t = torch.atleast_1d(torch.as_tensor(value).detach())
    except (TypeError, ValueError, RuntimeError):
        raise TimestepError(f"The model was called with {name} = {value!r}, which is no time step.") from None
    if not t.numel():
        raise TimestepError(f"The model was called with an empty {name}; pass at least one sample.")
    if t.is_complex() or t.dtype == torch.bool:
        raise TimestepError(f"The time step {name} must be real numbers, one or one per sample. Got {t.dtype}.")
    rows: Tensor = t.flatten(1).amax(1) if t.ndim > 1 else t
    return rows


def signature_of(model: nn.Module) -> Signature:
    """That of ``model.forward``, which each call asks for several times; raises ValueError where there is none."""
    model = uncompiled(model)
    function = getattr(model.forward, "__func__", None)
    return _signature_of_method(function) if type(function) is FunctionType else inspect.signature(model.forward)


@lru_cache(maxsize=64)
def _signature_of_method(function: FunctionType) -> Signature:
    return inspect.signature(MethodType(function, function))  # of any object


def time_argument(model: nn.Module, name: str | None = None) -> str:
    """The name of the model's time argument; raises :class:`ModelError` where there is none."""
    try:
        parameters = signature_of(model).parameters
    except ValueError:  # compiled by TorchScript
        parameters = MappingProxyType({})
    kinds = {p.kind for p in parameters.values()}
    if kinds <= {Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD} or Parameter.POSITIONAL_ONLY in kinds:
        raise ModelError(
            f"{type(model).__name__}.forward does not take its arguments by name, so none is known to hold the time "
            "step; give the module that it wraps, or one whose forward names them."
        )
    if name is not None:
        if name not in parameters:
            raise ModelError(f"{type(model).__name__}.forward has no argument named {name!r}; name its time argument.")
        return name
    found = usual_name(parameters)
    if found is not None:
        return found
    raise ModelError(
        f"{type(model).__name__}.forward has no argument that is known to hold a time step "
        f"({', '.join(USUAL_NAMES[:3])}); intervals depend on it. Give a diffusion model, or name the argument."
    )


def usual_name(parameters: Iterable[str]) -> str | None:
    """The one of a forward's parameters that holds the time step, by its name."""
    names = list(parameters)
    usual = (name for name in USUAL_NAMES if name in names)
    return next(usual, None) or next((name for name in names if "timestep" in name or "noise_time" in name), None)


def check_length(total: Any) -> None:
    """Raise :class:`TimestepError` for what is no number T of training steps; None is one that nobody knows."""
    if total is not None and (type(total) is not int or not 1 <= total <= LONGEST):
        raise TimestepError(f"num_train_timesteps must be a whole number from 1 to {LONGEST:,}. Got {total!r} instead.")


def find_axis(
    argument: str,
    seen: Collection[float],
    schedule: Sequence[float] = (),
    total: int | None = None,
    reach: Sequence[float] = (),
) -> TimeAxis:
    """The axis of a model from the values ``seen`` in its time argument.

    ``schedule`` are the scheduler's time steps of the same run, ``reach`` those of a run of all training steps,
    ``total`` is their number T. Where the scheduler counts in training steps, the usual forms are tried: t itself,
    t / T (sigma), 1 - t / T. Else values that never exceed 1 are parts of T, and those of another kind (sigma, its
    logarithm) are stretched over [0, T], with some room at both ends. There T is at least the usual one, and so it is
    where a scheduler has few training steps and values lie between them: a table of two entries follows nothing.
    """
    axis = _find_form(argument, seen, schedule, total, reach)
    t = [axis.scale * value + axis.offset for value in seen]
    if axis.num_train_timesteps >= FEW or all(abs(each - round(each)) < NEAR for each in t):
        return axis
    more = USUAL_LENGTH // axis.num_train_timesteps
    return TimeAxis(argument, more * axis.num_train_timesteps, more * axis.scale, more * axis.offset)


def _find_form(
    argument: str, seen: Collection[float], schedule: Sequence[float], total: int | None, reach: Sequence[float]
) -> TimeAxis:
    """The axis of a model as :func:`find_axis` says, however small T is."""
    given = [*schedule, *reach]
    largest = max(seen, default=1.0)
    length = total or (USUAL_LENGTH if largest <= USUAL_LENGTH else math.ceil(largest))
    forms = [TimeAxis(argument, length, *form) for form in ((1.0, 0.0), (length, 0.0), (-length, length))]
    if schedule and min(schedule) >= 0 and max(schedule) <= length and max(given) >= FINE * length:
        for axis in forms:
            if _all_on(schedule, axis, seen):
                return axis
    if schedule and _all_on(schedule, forms[0], seen):
        seen = given  # the model gets what the scheduler gives
    low, high = min(seen, default=0.0), max(seen, default=1.0)
    if low >= 0 and high <= 1 + LOOSE and not _whole(seen):
        return TimeAxis(argument, length, length / high) if high > 1 + NEAR / length else forms[1]
    if low >= 0 and high <= length and _are_steps(seen, length):
        return forms[0]
    length = max(length, USUAL_LENGTH)
    room = ROOM * ((high - low) or max(abs(high), 1.0))
    stretch = length / (high - low + 2 * room)
    return TimeAxis(argument, length, stretch, (room - low) * stretch)


def _all_on(schedule: Sequence[float], axis: TimeAxis, values: Iterable[float]) -> bool:
    """Whether all time values are steps of a scheduler's, as exactly as bfloat16 holds them."""
    least = max(map(abs, schedule)) / 8

    def on(value: float) -> bool:
        scaled = axis.scale * value
        return any(abs(scaled + axis.offset - step) <= LOOSE * max(abs(scaled), least) for step in schedule)

    return all(map(on, values))


def _are_steps(values: Collection[float], length: int) -> bool:
    """Whether values, which are on the axis, may be training steps: entries of a table tell them apart."""
    apart = all(after - before >= APART for before, after in pairwise(sorted({0.0, *values})))
    return apart or _whole(values) or max(values, default=length) >= FINE * length


def _whole(values: Collection[float]) -> bool:
    return all(value == int(value) for value in values)


def lookup(table: Tensor, t: Tensor) -> Tensor:
    """Values of ``table`` [T + 1, ...] at ``t`` [B] in [0, T]: [B, ...], exact for whole t, linear between neighbours.

    Integer tables (zero points) are interpolated and rounded. t was checked when the axis read it.
    """
    below = t.floor().long()
    low, high = table[below], table[t.ceil().long()]
    fraction = (t - below).to(torch.float32).view(-1, *[1] * (table.ndim - 1))
    value = low + (high - low) * fraction
    return value if table.is_floating_point() else value.round().to(table.dtype)


def between(values: Tensor, knots: Tensor, t: Tensor) -> Tensor:
    """Rows of ``values`` [K, ...] at ``t`` [B]: linear between the ``knots`` [K] (ascending), constant beyond."""
    after = torch.searchsorted(knots, t.to(knots.dtype).contiguous()).clamp(max=len(knots) - 1)
    before = (after - 1).clamp(min=0)
    gap = (knots[after] - knots[before]).clamp(min=torch.finfo(torch.float32).tiny)
    weight = ((t - knots[before]) / gap).clamp(0.0, 1.0).view(-1, *(1,) * (values.ndim - 1))
    return values[before] * (1 - weight) + values[after] * weight


_present: ContextVar[Tensor | None] = ContextVar("t of the call that runs now", default=None)


@contextmanager
def at(t: Tensor) -> Iterator[None]:
    """Run with ``t`` ([1], or [B] for each sample) as the time step of this call; other threads have their own."""
    token = _present.set(t)
    try:
        yield
    finally:
        _present.reset(token)


def of_call() -> Tensor | None:
    """The t that :func:`at` was given for the call that runs."""
    return _present.get()


def present(batch: int, device: torch.device | None = None) -> Tensor:
    """t of each of ``batch`` rows on ``device``, [batch]; a batch that holds k rows of each sample gets each t k times.

    Raises :class:`ModelError` outside a call, and for rows that belong to no sample while samples differ in t.
    """
    t = _present.get()
    if t is None:
        raise ModelError(
            "A quantizer ran outside the quantized model's forward pass; call the model, not its parts, and let it "
            "checkpoint by its own enable_gradient_checkpointing(), or not at all (torch.utils.checkpoint in its code)."
        )
    t = t.to(device)
    if len(t) == 1:
        return t.expand(batch)
    if batch % len(t):
        if bool((t == t[0]).all()):
            return t[:1].expand(batch)
        raise ModelError(f"{len(t)} time steps do not fit a batch of {batch}; pass one t, or one per sample.")
    return t.repeat_interleave(batch // len(t))
