"""Phase W of one unit: intervals of its weights, then learned rounding (AdaRound) and biases."""

from __future__ import annotations

import torch
from torch import Tensor

from ptq_tdq.affine import quantize
from ptq_tdq.config import Config
from ptq_tdq.modules import QuantLayer, WeightQuantizer
from ptq_tdq.recon.streams import UnitCall
from ptq_tdq.recon.unit import Unit
from ptq_tdq.rounding import AdaRound, annealed_b
from ptq_tdq.search import weight_qparams

LOSS_POWER = 2.0


def initialize(layer: QuantLayer, config: Config) -> None:
    """First intervals and nearest rounding for each channel range of a layer."""
    for index, quantizer in enumerate(layer.weight_quantizers()):
        weight = layer.part(index)
        rows = weight.flatten(1) if config.weight_granularity == "per_channel" else weight.reshape(1, -1)
        symmetric = config.symmetric_weights(quantizer.qtype.bits)
        found = weight_qparams(rows, quantizer.qtype, method=config.weight_range, symmetric=symmetric)
        shape = (-1,) + (1,) * (weight.ndim - 1)
        codes = quantize(weight, found.scale.view(shape), found.zero_point.view(shape), quantizer.qtype)
        layer.assign(index, codes, found.scale, found.zero_point)


def reconstruct_weights(
    unit: Unit, call: UnitCall, target: Tensor, config: Config, generator: torch.Generator
) -> tuple[float, float]:
    """Quantize the unit's weights; returns its loss with nearest rounding and at the end, which is never higher."""
    layers = unit.layers()
    for layer in layers:
        initialize(layer, config)
        layer.weights_enabled = True
    before = unit.loss(call, target, LOSS_POWER)
    if config.rounding == "nearest" or not config.weight_iterations:
        return before, before
    learned = [
        (layer, index, quantizer) for layer in layers for index, quantizer in enumerate(layer.weight_quantizers())
    ]
    nearest = [quantizer.codes for _, _, quantizer in learned]
    roundings = [_begin(layer, index, quantizer) for layer, index, quantizer in learned]
    with unit.learning():
        _learn(unit, call, target, roundings, config, generator)
    for (layer, index, quantizer), rounding in zip(learned, roundings, strict=True):
        _assign(layer, index, quantizer, rounding.hard_codes())
    after = unit.loss(call, target, LOSS_POWER)
    if after <= before:
        return before, after
    for (layer, index, quantizer), codes in zip(learned, nearest, strict=True):
        assert codes is not None
        _assign(layer, index, quantizer, codes)
    with torch.no_grad():
        for shift in unit.shifts():
            shift.zero_()
    return before, before


def _begin(layer: QuantLayer, index: int, quantizer: WeightQuantizer) -> AdaRound:
    assert quantizer.scale is not None and quantizer.zero_point is not None
    weight = layer.part(index)
    shape = (-1,) + (1,) * (weight.ndim - 1)
    scale, zero_point = quantizer.scale.view(shape), quantizer.zero_point.view(shape)
    quantizer.rounding = AdaRound(weight, scale, zero_point, quantizer.qtype)
    return quantizer.rounding


def _assign(layer: QuantLayer, index: int, quantizer: WeightQuantizer, codes: Tensor) -> None:
    assert quantizer.scale is not None and quantizer.zero_point is not None
    layer.assign(index, codes, quantizer.scale, quantizer.zero_point)


def _learn(
    unit: Unit, call: UnitCall, target: Tensor, roundings: list[AdaRound], config: Config, generator: torch.Generator
) -> None:
    optimizer = torch.optim.Adam(
        [
            {"params": [r.alpha for r in roundings], "lr": config.weight_lr},
            {"params": unit.shifts(), "lr": config.bias_lr},
        ]
    )
    for iteration in range(config.weight_iterations):
        index = torch.randint(len(target), (config.batch_size,), generator=generator)
        loss = unit.learning_loss(call, target, LOSS_POWER, config, index)
        b = annealed_b(
            iteration / config.weight_iterations,
            warmup=config.rounding_warmup,
            start=config.rounding_b_start,
            end=config.rounding_b_end,
        )
        if b is not None:
            for rounding in roundings:
                loss = loss + config.rounding_loss * rounding.regularizer(b)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
