"""What every interval source is: a module that gives scale and zero_point for a vector of time steps.

A source is one file in this folder with one subclass of :class:`IntervalSource`; naming a ``pattern`` registers it.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn

from ptq_tdq.errors import ConfigError
from ptq_tdq.intervals.choices import IntervalChoices
from ptq_tdq.intervals.smooth import smooth
from ptq_tdq.scheme import QType
from ptq_tdq.search import Histogram, QParams, activation_qparams


@dataclass(frozen=True)
class Observed:
    """What calibration saw at one quantizer: K time steps ``t`` (ascending, float) and a histogram row for each."""

    num_train_timesteps: int
    t: Tensor
    histogram: Histogram
    qtype: QType
    range_method: str = "mse"
    from_zero: bool = False
    choices: IntervalChoices = field(default_factory=IntervalChoices)
    ratios: Histogram | None = None  # errors [K, F] with ratios [F] of tokens' own ranges

    def search(self, histogram: Histogram, zero_point: Tensor | None = None) -> QParams:
        """The best interval of each row of a histogram, with any zero point or, where it is given, with that one."""
        return activation_qparams(
            histogram, self.qtype, method=self.range_method, from_zero=self.from_zero, zero_point=zero_point
        )

    @cached_property
    def static(self) -> QParams:
        """The best single interval over all steps; scalars."""
        pooled = self.histogram.pooled(torch.zeros(len(self.t), dtype=torch.int64), 1)
        found = self.search(pooled)
        return QParams(found.scale[0], found.zero_point[0])

    def intervals(self, histogram: Histogram) -> QParams:
        """The best interval of each row of a histogram, with the static zero point where choices say "fixed"."""
        return self.search(histogram, self.static.zero_point if self.choices.zero_point == "fixed" else None)

    @cached_property
    def steps(self) -> QParams:
        """The best interval of each step [K]."""
        return self.intervals(self.histogram)

    @cached_property
    def curve(self) -> QParams:
        """A smooth curve through the steps' intervals on the whole axis, drawn to the static one: [T + 1]."""
        axis, static = torch.arange(self.num_train_timesteps + 1), self.static
        scale = static.scale * smooth(self.t, (self.steps.scale / static.scale).log(), axis).exp()
        moved = smooth(self.t, self.steps.zero_point - static.zero_point, axis).round().to(torch.int32)
        return QParams(scale, (static.zero_point + moved).clamp(self.qtype.qmin, self.qtype.qmax))

    @property
    def gap(self) -> float:
        """The largest distance between neighbouring observed steps."""
        return float(self.t.diff().max()) if len(self.t) > 1 else float(self.num_train_timesteps)

    def spread(self, values: Tensor) -> Tensor:
        """Values [K] at the observed steps, linear in between and constant beyond, on the whole axis 0..T: [T + 1]."""
        axis = np.arange(self.num_train_timesteps + 1)
        dense = torch.from_numpy(np.interp(axis, self.t.numpy(), values.double().numpy()))
        return dense.to(torch.float32) if values.is_floating_point() else dense.round().to(values.dtype)


class Float32Module(nn.Module):
    """Moves with the model but stays float32: ``model.half()`` must not round scales."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)  # type: ignore[no-untyped-call]
        return self


class IntervalSource(Float32Module, ABC):
    """Scale and zero_point of one activation quantizer as a function of t (of dynamic ones, of the tensor too)."""

    pattern: ClassVar[str]
    """A regular expression: the names of methods that this source is for."""
    timed: ClassVar[bool] = True
    """Whether it is a function of t alone, so that a table can hold it."""
    by_token: ClassVar[bool] = False
    """Whether it gives an interval for each token; see ``dynamic_token.py``."""
    by_sample: ClassVar[bool] = False
    """Whether it gives an interval from all values of each sample."""
    registry: ClassVar[dict[str, type[IntervalSource]]] = {}

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "pattern" in cls.__dict__:
            IntervalSource.registry[cls.pattern] = cls

    @classmethod
    @abstractmethod
    def build(cls, method: str, observed: Observed) -> IntervalSource:
        """A source at its start, from what calibration observed."""

    @abstractmethod
    def forward(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """``t`` [B] and the tensor [B, ...] -> scale float32 [B], zero_point int32 [B]; of tokens, one for each."""

    def raw_parameters(self) -> list[nn.Parameter]:
        """Learned scales, to be trained at the interval learning rate; the others are a module's weights."""
        return [p for owner in self.modules() if isinstance(owner, LearnedScale) for p in owner.parameters()]

    def table(self, num_train_timesteps: int) -> tuple[Tensor, Tensor]:
        """Scale float32 [T + 1] and zero_point int32 [T + 1] at every time step 0..T."""
        self.eval()
        with torch.no_grad():
            own = next((x.device for x in (*self.parameters(), *self.buffers())), None)
            t = torch.arange(num_train_timesteps + 1, device=own)
            scale, zero_point = self(t, torch.empty(len(t), 0, device=own))
        return scale.float().contiguous(), zero_point.to(torch.int32).contiguous()


class LearnedScale(nn.Module):
    """A vector of positive scales [N] learned raw, as LSQ does, or through its logarithm (a step is then relative)."""

    def __init__(self, scale: Tensor, parameter: str) -> None:
        super().__init__()
        self.log = parameter == "log"
        self.value = nn.Parameter(scale.log() if self.log else scale.clone())

    def forward(self) -> Tensor:
        return (self.value.exp() if self.log else self.value).clamp(min=torch.finfo(torch.float32).tiny)


def source_class(method: str) -> type[IntervalSource]:
    """The source class of a method name; raises :class:`ConfigError` that lists the names."""
    for pattern, cls in IntervalSource.registry.items():
        if re.fullmatch(pattern, method):
            return cls
    names = ", ".join(sorted(IntervalSource.registry)).replace(r"|S_([1-9][0-9]{0,3})", ", S_N (S_4, up to S_9999)")
    raise ConfigError(f"The method must be one of {names}. Got {method!r} instead.")
