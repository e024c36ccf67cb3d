"""Method ``auto``: which quantizers of a unit follow t, before anything is learned."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from ptq_tdq.config import Config
from ptq_tdq.intervals import IntervalSource, Observed, source_class
from ptq_tdq.intervals.auto import FOLLOWING, SIMPLE, Auto
from ptq_tdq.modules import ActivationQuantizer
from ptq_tdq.recon.parts import Parts
from ptq_tdq.recon.streams import UnitCall
from ptq_tdq.recon.unit import Unit

ERRORS = 2.0  # standard errors that a gain must exceed to be believed


def undecided(unit: Unit) -> list[ActivationQuantizer]:
    """The unit's quantizers whose method is still "auto"."""
    return [q for q in unit.quantizers() if q.record.method == Auto.pattern]


def choose(unit: Unit, call: UnitCall, target: Parts, config: Config, observed: Mapping[str, Observed]) -> None:
    """Put the chosen method of each undecided quantizer, and what following t is worth, into its record.

    Sources are judged as they start: to learn them first gained nothing (docs/results.md). A quantizer follows t
    where that alone makes the loss of the held-out samples smaller, by more than ``ERRORS`` standard errors of the
    difference sample by sample, and if what all of those give together does so too. Ranges of these samples are among
    those that intervals were searched in.
    """
    judge, quantizers = unit.split()[1], undecided(unit)

    def started(method: str) -> list[IntervalSource]:
        found = (source_class(method).build(method, observed[q.record.name]) for q in quantizers)
        return [source.to(unit.device).eval() for source in found]

    def loss_with(sources: list[IntervalSource]) -> Tensor:
        for quantizer, source in zip(quantizers, sources, strict=True):
            quantizer.source = source
        return judge.losses(call, target, config.activations.loss_power)

    following, simple = started(FOLLOWING), started(SIMPLE)
    static = loss_with(simple)
    alone = [loss_with([*simple[:i], source, *simple[i + 1 :]]) for i, source in enumerate(following)]
    pays = [believed(static - moved) for moved in alone]
    together = loss_with([f if p else s for f, s, p in zip(following, simple, pays, strict=True)])
    for quantizer, moved, own in zip(quantizers, alone, pays, strict=True):
        method = FOLLOWING if own and believed(static - together) else SIMPLE
        quantizer.record = replace(quantizer.record, method=method, gain_db=ratio_db(static, moved))


def believed(gain: Tensor) -> bool:
    """Whether the mean of the samples' gains [n] is above 0 by more than chance explains."""
    error = float(gain.std()) / math.sqrt(len(gain)) if len(gain) > 1 else math.inf
    return float(gain.mean()) > ERRORS * error


def ratio_db(static: Tensor, moved: Tensor) -> float:
    """The ratio of two mean losses in dB; 0 where there is none."""
    a, b = float(static.mean()), float(moved.mean())
    return round(10 * math.log10(a / b), 3) if a > 0 and b > 0 and math.isfinite(a / b) else 0.0
