"""Phase A of one unit: observe, start the interval sources, learn them and the biases, freeze them, round again."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ptq_tdq import processes
from ptq_tdq.config import Config
from ptq_tdq.errors import NonFiniteError
from ptq_tdq.intervals import IntervalChoices, IntervalSource, Observed, source_class
from ptq_tdq.intervals.auto import SIMPLE
from ptq_tdq.intervals.dynamic import Dynamic
from ptq_tdq.intervals.mlp import ModuleInterval
from ptq_tdq.intervals.table import TableSource
from ptq_tdq.modules import ActivationQuantizer
from ptq_tdq.observe import Observer
from ptq_tdq.recon.choice import choose, undecided
from ptq_tdq.recon.parts import Parts
from ptq_tdq.recon.streams import UnitCall
from ptq_tdq.recon.token_choice import choose_tokens
from ptq_tdq.recon.unit import Unit
from ptq_tdq.recon.weights import round_last
from ptq_tdq.search import QParams

STATIC = ("static", "S_1", "fixed")  # methods that do not follow t


@dataclass(frozen=True)
class ActivationResult:
    """Loss with the first intervals and at the end, each quantizer's static interval for comparison, and the outputs
    for all samples of the call that it has learned from, where they are known.
    """

    before: float
    after: float
    static: dict[str, QParams]
    outputs: Parts | None


def observe(
    quantizers: Collection[ActivationQuantizer],
    steps: Tensor,
    choices: IntervalChoices,
    num_train_timesteps: int,
    run: Callable[[], None],
) -> dict[str, Observed]:
    """Ranges and histograms of what quantizers are given at the ``steps`` [K], by quantizer name.

    ``run`` runs what they are in on this process's samples, and is called twice.
    """
    for quantizer in quantizers:
        record = quantizer.record
        vectors = quantizer.qtype if source_class(record.method).by_token else None
        quantizer.observer = Observer(record.name, steps, ema=record.range_method == "ema", vectors=vectors)
    observers = {q.record.name: q.observer for q in quantizers if q.observer}
    try:
        for counting in (False, True):
            if counting:
                for observer in observers.values():
                    observer.start_counting()
            with torch.no_grad():
                run()
            for observer in observers.values():
                observer.join()
    finally:
        for quantizer in quantizers:
            quantizer.observer = None
    return {
        q.record.name: Observed(
            num_train_timesteps,
            steps,
            observers[q.record.name].filled(),
            q.qtype,
            q.record.range_method,
            q.record.from_zero,
            choices,
            observers[q.record.name].ratios(),
        )
        for q in quantizers
    }


def reconstruct_activations(
    unit: Unit,
    full: UnitCall,
    call: UnitCall,
    target: Parts,
    config: Config,
    generator: torch.Generator,
    num_train_timesteps: int,
    observed: dict[str, Observed] | None = None,
) -> ActivationResult:
    """Learn the intervals of the unit's activations; the end is never worse than the start.

    Nor is it worse than S_1, which is learned first, from the same samples: of both the better one stays. ``full`` is
    the unit's call in the full-precision stream, ``call`` the one to learn from. Intervals start from what is
    ``observed``, by default in that call.
    """

    def run() -> None:
        for batch in unit.batches():
            unit.run(call, batch)

    quantizers = unit.quantizers()
    observed = observed or observe(quantizers, unit.t.unique(), config.intervals, num_train_timesteps, run)
    _begin_static(unit, observed)
    if open_ones := undecided(unit):
        with torch.random.fork_rng([unit.device] if unit.device.type == "cuda" else []):
            choose(unit, call, target, config, observed)
        if config.activations.token_intervals == "auto":
            choose_tokens(unit, open_ones, call, target, config)
        _begin_static(unit, observed)
    best, follow = _Best(unit, call, target, config.activations.loss_power), [q for q in quantizers if _follows(q)]
    before = best.consider()
    first, seed = [shift.detach().clone() for shift in unit.shifts()], generator.initial_seed()
    if _learn(unit, call, target, config, torch.Generator().manual_seed(seed) if follow else generator):
        best.consider()
    if follow:
        unit.set_shifts(first)
        before = _start(unit, follow, observed, best, before)
        if _learn(unit, call, target, config, generator):
            best.consider()
    best.restore()
    if not math.isfinite(best.loss):
        unit.require_finite(unit.outputs(call))
    for quantizer in follow:
        if quantizer.record.gain_db is not None and not isinstance(quantizer.source, ModuleInterval):
            quantizer.record = replace(quantizer.record, method=SIMPLE)  # on all samples it has not paid
    for quantizer in quantizers:
        freeze(quantizer, num_train_timesteps)
    after, outputs = round_last(unit, full, call, target, config, generator, best.loss)
    return ActivationResult(before, after, {name: o.static for name, o in observed.items()}, outputs)


def _follows(quantizer: ActivationQuantizer) -> bool:
    """Whether the method is one of intervals that follow t."""
    return source_class(quantizer.record.method).timed and quantizer.record.method not in STATIC


def _begin_static(unit: Unit, observed: dict[str, Observed]) -> None:
    """Switch the unit's quantizers on, with S_1 in the place of what follows t."""
    for quantizer in unit.quantizers():
        quantizer.source = _build(unit, quantizer, observed, "static" if _follows(quantizer) else None)
        quantizer.enabled = True


def _start(
    unit: Unit, follow: list[ActivationQuantizer], observed: dict[str, Observed], best: _Best, static: float
) -> float:
    """Put the sources that follow t at their start; modules begin static where that has a lower loss. Returns it."""
    for quantizer in unit.quantizers():
        quantizer.source = _build(unit, quantizer, observed)
    own = best.consider()
    if not static < own or not any(isinstance(q.source, ModuleInterval) for q in follow):
        return own
    for quantizer in follow:
        found = observed[quantizer.record.name]
        choices = replace(found.choices, module_start="static", zero_point="fixed")
        quantizer.source = _build(unit, quantizer, {quantizer.record.name: replace(found, choices=choices)})
    return static


def _build(
    unit: Unit, quantizer: ActivationQuantizer, observed: dict[str, Observed], method: str | None = None
) -> IntervalSource:
    """A source at its start, by default that of the record; raises :class:`NonFiniteError` naming the quantizer."""
    method = method or quantizer.record.method
    try:
        source = source_class(method).build(method, observed[quantizer.record.name])
    except NonFiniteError as error:
        raise NonFiniteError(f"{quantizer.record.name}: {error}") from error
    return source.to(unit.device).eval()


class _Best:
    """The state with the lowest loss among those considered: sources and bias corrections."""

    def __init__(self, unit: Unit, call: UnitCall, target: Parts, power: float) -> None:
        self.unit, self.call, self.target, self.power = unit, call, target, power
        self.loss, self.state = math.inf, list[Any]()

    def consider(self) -> float:
        """Take the present state if its loss, which is returned, is lower."""
        for quantizer in self.unit.quantizers():
            assert quantizer.source is not None
            quantizer.source.eval()
        loss = self.unit.loss(self.call, self.target, self.power)
        if not self.state or loss < self.loss or math.isnan(self.loss):
            shifts = [shift.detach().clone() for shift in self.unit.shifts()]
            self.loss, self.state = loss, [copy.deepcopy([q.source for q in self.unit.quantizers()]), shifts]
        return loss

    def restore(self) -> None:
        sources, shifts = self.state
        for quantizer, source in zip(self.unit.quantizers(), sources, strict=True):
            quantizer.source = source
        self.unit.set_shifts(shifts)


def freeze(quantizer: ActivationQuantizer, num_train_timesteps: int) -> None:
    """Evaluate a source at every time step and keep only its table; a dynamic source stays, no longer learned.

    Raises :class:`NonFiniteError` for an interval that float32 does not hold, as at steps that calibration never saw.
    """
    assert quantizer.source is not None
    quantizer.source.requires_grad_(False)
    if isinstance(quantizer.source, Dynamic):
        quantizer.source.freeze(num_train_timesteps)
        return
    scale, zero_point = quantizer.source.table(num_train_timesteps)
    finite = torch.isfinite(scale * quantizer.qtype.qmax).cpu()
    if not bool(finite.all()):
        t = int((~finite).nonzero()[0])
        raise NonFiniteError(
            f"{quantizer.record.name} has learned an interval that float32 cannot hold at t = {t}; "
            "choose another method or lower learning rates."
        )
    quantizer.source = TableSource(scale.clamp(min=torch.finfo(torch.float32).tiny), zero_point)


def learning_iterations(config: Config, samples: int) -> int:
    """Iterations of a block in phase A, with a calibration set of so many samples."""
    most, epochs = config.activations.activation_iterations, config.activations.activation_epochs
    return min(most, -(-epochs * samples // config.learning.batch_size)) if epochs else most


def _learn(unit: Unit, call: UnitCall, target: Parts, config: Config, generator: torch.Generator) -> bool:
    """Adam with cosine decay to 0 over the unit's sources and bias corrections; whether there was anything to learn."""
    sources = nn.ModuleList(q.source for q in unit.quantizers() if q.source)
    phase, iterations = config.activations, learning_iterations(config, sum(map(len, unit.cells)))
    if not iterations or not any(True for _ in sources.parameters()):
        return False
    raw = [p for s in sources if isinstance(s, IntervalSource) for p in s.raw_parameters()]
    known = {id(p) for p in raw}
    weights = [p for p in sources.parameters() if id(p) not in known]
    optimizer = torch.optim.Adam(
        [
            {"params": raw, "lr": phase.interval_lr},
            {"params": weights, "lr": phase.module_lr},
            {"params": unit.shifts(), "lr": config.learning.bias_lr},
        ]
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    sources.train()
    chances = None if phase.loss_weights == "uniform" else sample_chances(unit, target, phase.loss_power)
    with unit.learning():
        for _ in range(iterations):
            index = unit.draw(config.learning.batch_size, generator, chances)
            if not unit.descend(call, target, phase.loss_power, config, index, optimizer):
                break
            schedule.step()
    sources.eval()
    return True


def sample_chances(unit: Unit, target: Parts, power: float) -> Tensor:
    """One over the mean size of the targets at each sample's time step [N], but for a common factor."""
    tiny = torch.finfo(torch.float32).tiny
    batches = list(unit.batches())
    # in the unit of the largest value no power overflows
    largest = max((float(x.abs().max()) for batch in batches for x in target.real(batch)), default=0.0)
    largest = max(processes.gather([largest])) or tiny
    size = torch.zeros(len(unit.t))
    for batch in batches:
        count = len(unit.t[batch])
        sizes = [(x.float() / largest).abs().pow(power).reshape(count, -1).mean(1) for x in target.real(batch)]
        size[batch] = torch.stack(sizes).mean(0).cpu() if sizes else 1.0
    size = processes.total(size)
    _, step, count = unit.t.unique(return_inverse=True, return_counts=True)
    of_step = torch.zeros(len(count)).index_add(0, step, size) / count
    relative = of_step / of_step.max().clamp(min=tiny)
    chances: Tensor = 1 / relative.clamp(min=1e-6)[step]
    return chances
