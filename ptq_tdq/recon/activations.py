"""Phase A of one unit: observe, start the interval sources, learn them and the biases, freeze them, round again."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ptq_tdq.config import Config
from ptq_tdq.errors import NonFiniteError
from ptq_tdq.intervals import IntervalSource, Observed, source_class
from ptq_tdq.intervals.dynamic import Dynamic
from ptq_tdq.intervals.table import TableSource
from ptq_tdq.modules import ActivationQuantizer
from ptq_tdq.observe import Observer
from ptq_tdq.recon.parts import Parts
from ptq_tdq.recon.streams import UnitCall
from ptq_tdq.recon.unit import Unit
from ptq_tdq.recon.weights import round_last
from ptq_tdq.search import QParams


@dataclass(frozen=True)
class ActivationResult:
    """Loss with the first intervals and at the end, and each quantizer's static interval for comparison."""

    before: float
    after: float
    static: dict[str, QParams]


def observe(unit: Unit, call: UnitCall, config: Config, num_train_timesteps: int) -> dict[str, Observed]:
    """Ranges and histograms of the unit's activations with quantized weights, by quantizer name."""
    steps = unit.t.unique()
    quantizers = unit.quantizers()
    for quantizer in quantizers:
        record = quantizer.record
        vectors = quantizer.qtype if source_class(record.method).by_token else None
        quantizer.observer = Observer(record.name, steps, ema=record.range_method == "ema", vectors=vectors)
    observers = {q.record.name: q.observer for q in quantizers if q.observer}
    try:
        for counting in (False, True):
            for observer in observers.values():
                if counting:
                    observer.start_counting()
            with torch.no_grad():
                for batch in unit.batches():
                    unit.run(call, batch)
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
            config.interval_options,
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
) -> ActivationResult:
    """Learn the intervals of the unit's activations; the end state is never worse than the start.

    ``full`` is the unit's call in the full-precision stream, ``call`` the one to learn from.
    """
    observed = observe(unit, call, config, num_train_timesteps)
    quantizers = unit.quantizers()
    for quantizer in quantizers:
        record = quantizer.record
        try:
            source = source_class(record.method).build(record.method, observed[record.name])
        except NonFiniteError as error:
            raise NonFiniteError(f"{record.name}: {error}") from error
        quantizer.source, quantizer.enabled = source.to(unit.device), True
    sources = nn.ModuleList(q.source for q in quantizers if q.source)
    sources.eval()
    before = after = unit.loss(call, target, config.loss_power)
    if config.activation_iterations and any(True for _ in sources.parameters()):
        with unit.learning():
            after = _learn(unit, call, target, sources, config, generator, before)
    for quantizer in quantizers:
        freeze(quantizer, num_train_timesteps)
    after = round_last(unit, full, call, target, config, generator, after)
    return ActivationResult(before, after, {name: o.static for name, o in observed.items()})


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


def _learn(
    unit: Unit,
    call: UnitCall,
    target: Parts,
    sources: nn.ModuleList,
    config: Config,
    generator: torch.Generator,
    before: float,
) -> float:
    """Adam with cosine decay to 0; leaves the better of the first and the last state and returns its loss."""
    raw = [p for s in sources if isinstance(s, IntervalSource) for p in s.raw_parameters()]
    known = {id(p) for p in raw}
    weights = [p for p in sources.parameters() if id(p) not in known]
    optimizer = torch.optim.Adam(
        [
            {"params": raw, "lr": config.interval_lr},
            {"params": weights, "lr": config.module_lr},
            {"params": unit.shifts(), "lr": config.bias_lr},
        ]
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.activation_iterations)
    first, first_shifts = _state(unit, sources)
    sources.train()
    chances = None if config.loss_weights == "uniform" else _chances(unit, target, config.loss_power)
    for _ in range(config.activation_iterations):
        index = unit.draw(config.batch_size, generator, chances)
        loss = unit.learning_loss(call, target, config.loss_power, config, index)
        if not loss.requires_grad:  # no output of any sample depends on what is learned
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    sources.eval()
    after = unit.loss(call, target, config.loss_power)
    if after <= before:
        return after
    sources.load_state_dict(first)
    with torch.no_grad():
        for shift, value in zip(unit.shifts(), first_shifts, strict=True):
            shift.copy_(value)
    return before


def _chances(unit: Unit, target: Parts, power: float) -> Tensor:
    """One over the mean size of the targets at each sample's time step [N], but for a common factor."""
    tiny = torch.finfo(torch.float32).tiny
    batches = list(unit.batches())
    # in the unit of the largest value no power overflows
    largest = max((float(x.abs().max()) for batch in batches for x in target.real(batch)), default=0.0) or tiny
    size = torch.zeros(len(unit.t))
    for batch in batches:
        count = len(unit.t[batch])
        sizes = [(x.float() / largest).abs().pow(power).reshape(count, -1).mean(1) for x in target.real(batch)]
        size[batch] = torch.stack(sizes).mean(0).cpu() if sizes else 1.0
    _, step, count = unit.t.unique(return_inverse=True, return_counts=True)
    of_step = torch.zeros(len(count)).index_add(0, step, size) / count
    relative = of_step / of_step.max().clamp(min=tiny)
    chances: Tensor = 1 / relative.clamp(min=1e-6)[step]
    return chances


def _state(unit: Unit, sources: nn.ModuleList) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Copies of all that phase A learns."""
    return copy.deepcopy(sources.state_dict()), [shift.detach().clone() for shift in unit.shifts()]
