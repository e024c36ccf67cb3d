"""Weights of one unit: their intervals and rounding (nearest, in closed form or learned), and the last rounding."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ptq_tdq.affine import quantize
from ptq_tdq.config import Config
from ptq_tdq.errors import NonFiniteError
from ptq_tdq.modules import QuantLayer, WeightQuantizer
from ptq_tdq.recon.closed_form import round_unit
from ptq_tdq.recon.parts import Parts
from ptq_tdq.recon.streams import UnitCall
from ptq_tdq.recon.unit import Unit
from ptq_tdq.rounding import AdaRound, LearnedCodes, annealed_b
from ptq_tdq.scheme import MAX_BITS
from ptq_tdq.search import row_qparams

LOSS_POWER = 2.0
CHECKS = 8  # times that learning is judged on held-out samples
LEARNED_BITS = 3  # at 4 bits nothing learned was better than the closed form (benchmarks/results/rounding.jsonl)

_WeightState = tuple[list[tuple[Tensor | None, Tensor | None, Tensor | None]], list[Tensor]]


def initialize(layer: QuantLayer, config: Config) -> None:
    """First intervals and nearest rounding for each channel range of a layer.

    Raises :class:`NonFiniteError` for weights whose range float32 does not hold.
    """
    for index, quantizer in enumerate(layer.weight_quantizers()):
        weight = layer.part(index)
        rows = weight.flatten(1) if config.weights.weight_granularity == "per_channel" else weight.reshape(1, -1)
        symmetric = config.symmetric_weights(quantizer.qtype.bits)
        found = row_qparams(rows, quantizer.qtype, method=config.weights.weight_range, symmetric=symmetric)
        if not bool(torch.isfinite(2 * quantizer.qtype.qmax * found.scale).all()):  # twice, because scales may grow
            raise NonFiniteError(f"{layer.record.name} has weights that are too large for an interval in float32.")
        shape = (-1,) + (1,) * (weight.ndim - 1)
        codes = quantize(weight, found.scale.view(shape), found.zero_point.view(shape), quantizer.qtype)
        layer.assign(index, codes, found.scale, found.zero_point)


@dataclass(frozen=True)
class WeightResult:
    """Loss with nearest rounding and at the end, and the outputs of all samples, where they are known."""

    before: float
    after: float
    outputs: Parts | None


def reconstruct_weights(
    unit: Unit, full: UnitCall, call: UnitCall, target: Parts, config: Config, generator: torch.Generator
) -> WeightResult:
    """Quantize the unit's weights; its loss is never higher at the end than with nearest rounding.

    ``full`` and ``call`` are the unit's calls in the full-precision and in the quantized stream.
    """
    layers = unit.layers()
    for layer in layers:
        initialize(layer, config)
        layer.weights_enabled = True
    if config.weights.rounding == "nearest":
        outputs = unit.outputs(call)
        before = unit.loss_of(outputs, target, LOSS_POWER)
        return WeightResult(before, before, outputs)
    before, nearest, found = unit.loss(call, target, LOSS_POWER), _weight_state(unit), None
    if config.weights.rounding == "adaround":
        _adaround(unit, call, target, config, generator)
    else:
        found = _round(unit, full, call, config, generator)
    return WeightResult(before, *_settle(unit, call, target, LOSS_POWER, before, nearest, found))


def round_last(
    unit: Unit, full: UnitCall, call: UnitCall, target: Parts, config: Config, generator: torch.Generator, loss: float
) -> tuple[float, Parts | None]:
    """What is done to the unit's weights once its inputs pass through their quantizers.

    With ``round_again`` they are rounded in closed form once more: the errors of quantized inputs are noise in all
    directions, the inputs themselves lie in few, so the compensation makes weights that listen less where there is
    mostly noise. Then "learned" codes are learned, where weights have few bits. Returns the unit's loss, which is never
    above ``loss``, and its outputs, where they are known.
    """
    kept, outputs = _weight_state(unit), None
    if config.weights.rounding in ("gptq", "learned") and config.weights.round_again:
        for layer in unit.layers():
            initialize(layer, config)
        found = _round(unit, full, call, config, generator)
        loss, outputs = _settle(unit, call, target, config.activations.loss_power, loss, kept, found)
    if _learns(unit, config):
        kept, outputs = _weight_state(unit), None
        _learn_codes(unit, call, target, config, generator)
        loss, outputs = _settle(unit, call, target, config.activations.loss_power, loss, kept)
    return loss, outputs


def _round(unit: Unit, full: UnitCall, call: UnitCall, config: Config, generator: torch.Generator) -> Parts | None:
    """Round in closed form from the first intervals; returns the unit's outputs, where they are known."""
    first, drawn, seen = _weight_state(unit), generator.get_state(), _seen(unit, config)
    outputs = round_unit(seen, full, call, config, generator)
    if outputs is None:
        _set_weights(unit, first)
        generator.set_state(drawn)
        outputs = round_unit(replace(seen, waiting=0), full, call, config, generator)
    return outputs if seen is unit else None


def _seen(unit: Unit, config: Config) -> Unit:
    """The unit on the samples that its weights are rounded by: not on those that will judge what is learned."""
    return unit.split()[0] if _learns(unit, config) else unit


def _learns(unit: Unit, config: Config) -> bool:
    bits = [quantizer.qtype.bits for _, _, quantizer in _parts(unit.layers())]
    return config.weights.rounding == "learned" and min(bits, default=MAX_BITS) <= LEARNED_BITS


def _settle(
    unit: Unit, call: UnitCall, target: Parts, power: float, loss: float, before: _WeightState,
    found: Parts | None = None,
) -> tuple[float, Parts | None]:  # fmt: skip
    """The lower one of the unit's loss now and ``loss``, to whose state ``before`` it goes back if need be.

    With the outputs as they are then, where that is now; ``found`` are those of now, if they are known.
    """
    outputs = unit.outputs(call) if found is None else found
    after = unit.loss_of(outputs, target, power)
    if after <= loss:
        return after, outputs
    _set_weights(unit, before)
    return loss, None


def _weight_state(unit: Unit) -> _WeightState:
    """What a unit's weights now are: codes, scale and zero point of every channel range, and the bias corrections."""
    parts = [(w.codes, w.scale, w.zero_point) for _, _, w in _parts(unit.layers())]
    return parts, [shift.detach().clone() for shift in unit.shifts()]


def _set_weights(unit: Unit, state: _WeightState) -> None:
    """Inverse of :func:`_weight_state`."""
    parts, shifts = state
    for (layer, index, _), (codes, scale, zero_point) in zip(_parts(unit.layers()), parts, strict=True):
        assert codes is not None and scale is not None and zero_point is not None
        layer.assign(index, codes, scale, zero_point)
    unit.set_shifts(shifts)


def _parts(layers: list[QuantLayer]) -> list[tuple[QuantLayer, int, WeightQuantizer]]:
    """Every channel range of every layer with its quantizer."""
    return [(layer, index, quantizer) for layer in layers for index, quantizer in enumerate(layer.weight_quantizers())]


def _adaround(unit: Unit, call: UnitCall, target: Parts, config: Config, generator: torch.Generator) -> None:
    parts = _parts(unit.layers())
    roundings = [_begin(*part) for part in parts]
    with unit.learning():
        _learn(unit, call, target, roundings, config, generator)
    for (layer, index, quantizer), rounding in zip(parts, roundings, strict=True):
        scale, zero_point = quantizer.grid()
        layer.assign(index, rounding.hard_codes(), scale.flatten(), zero_point.flatten())


def _begin(layer: QuantLayer, index: int, quantizer: WeightQuantizer) -> AdaRound:
    quantizer.rounding = rounding = AdaRound(layer.part(index), *quantizer.grid(), quantizer.qtype)
    return rounding


def _begin_codes(layer: QuantLayer, index: int, quantizer: WeightQuantizer) -> LearnedCodes:
    assert quantizer.codes is not None
    grid = quantizer.grid()
    quantizer.rounding = learned = LearnedCodes(layer.part(index), quantizer.codes, *grid, quantizer.qtype)
    return learned


def _learn(
    unit: Unit, call: UnitCall, target: Parts, roundings: list[AdaRound], config: Config, generator: torch.Generator
) -> None:
    choices = config.weights
    optimizer = torch.optim.Adam(
        [
            {"params": [r.alpha for r in roundings], "lr": choices.weight_lr},
            {"params": unit.shifts(), "lr": config.learning.bias_lr},
        ]
    )
    for iteration in range(choices.weight_iterations):
        index = unit.draw(config.learning.batch_size, generator)
        b = annealed_b(
            iteration / choices.weight_iterations,
            warmup=choices.rounding_warmup,
            start=choices.rounding_b_start,
            end=choices.rounding_b_end,
        )
        penalties = [] if b is None else [choices.rounding_loss * rounding.regularizer(b) for rounding in roundings]
        if not unit.descend(call, target, LOSS_POWER, config, index, optimizer, penalties):
            break


def _learn_codes(unit: Unit, call: UnitCall, target: Parts, config: Config, generator: torch.Generator) -> None:
    """Learn codes, scales and bias corrections from the present ones (Adam, cosine decay to 0).

    Of these and of those at each check, the ones with the lowest loss on the held-out trajectories stay.
    """
    seen, judge = unit.split()
    power, iterations = config.activations.loss_power, config.weights.weight_iterations
    best, lowest = _weight_state(unit), judge.loss(call, target, power)
    learned = [_begin_codes(*part) for part in _parts(unit.layers())]
    params = [c.position for c in learned], [c.log_scale for c in learned], unit.shifts()
    rates = config.weights.weight_lr, config.weights.scale_lr, config.learning.bias_lr
    optimizer = torch.optim.Adam([{"params": p, "lr": lr} for p, lr in zip(params, rates, strict=True)])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, iterations))
    checks = {-(-iterations * check // CHECKS) for check in range(1, CHECKS + 1)}
    with unit.learning():
        for iteration in range(1, iterations + 1):
            index = seen.draw(config.learning.batch_size, generator)
            if not seen.descend(call, target, power, config, index, optimizer):
                break
            schedule.step()
            if iteration in checks:
                now = judge.loss(call, target, power)
                if now < lowest:
                    best, lowest = _learned_state(unit, learned), now
    _set_weights(unit, best)


def _learned_state(unit: Unit, learned: list[LearnedCodes]) -> _WeightState:
    """The :func:`_weight_state` that the present codes give."""
    return [
        (codes.hard_codes(), codes.scale().detach().flatten(), quantizer.zero_point)
        for codes, (_, _, quantizer) in zip(learned, _parts(unit.layers()), strict=True)
    ], [shift.detach().clone() for shift in unit.shifts()]
