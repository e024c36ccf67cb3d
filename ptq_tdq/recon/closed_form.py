"""Rounding of a unit's weights in closed form, layer after layer: compensation for the quantized inputs, then GPTQ."""

from __future__ import annotations

import torch
from torch import Tensor

from ptq_tdq.config import Config
from ptq_tdq.gptq import compensated, gptq, layer_error
from ptq_tdq.modules import QuantLayer
from ptq_tdq.recon.moments import Moments, moments
from ptq_tdq.recon.streams import UnitCall
from ptq_tdq.recon.unit import Unit
from ptq_tdq.scheme import QType

FACTORS = (1.06, 1.0, 0.95, 0.9, 0.85)  # of the first scales; each output channel keeps the best


def round_unit(unit: Unit, full: UnitCall, mine: UnitCall, config: Config, generator: torch.Generator) -> None:
    """Give each layer of the unit, whose first intervals are known, its codes, scales and bias correction.

    A layer sees the inputs that the quantized layers before it, in the unit and before it, have left.
    """
    layers = unit.layers()
    for layer in layers:
        layer.weights_enabled = False
    for layer in layers:
        centred = layer.shift is not None and config.bias_lr > 0
        found = moments(unit, layer, full, mine, generator, centred=centred)
        with torch.no_grad():
            _round(layer, found, config.damping, shared_scale=config.weight_granularity == "per_tensor")
        layer.weights_enabled = True


def _round(layer: QuantLayer, found: list[Moments], damping: float, *, shared_scale: bool) -> None:
    weight, columns = layer.weight.flatten(1).float(), layer.weight[0, 0].numel()
    quantizers = layer.weight_quantizers()
    widths = torch.tensor([(hi - lo) * columns for lo, hi in layer.ranges])
    scale, zero_point = (
        torch.stack([getattr(q, key).expand(len(weight)) for q in quantizers], 1).repeat_interleave(widths, 1)
        for key in ("scale", "zero_point")
    )
    groups = zip(weight.chunk(len(found)), scale.chunk(len(found)), zero_point.chunk(len(found)), found, strict=True)
    done = [_candidates(*group, damping, quantizers[0].qtype) for group in groups]
    errors = torch.cat([d[0] for d in done], 1)  # [candidates, O]
    best = (errors.sum(1, keepdim=True).expand_as(errors) if shared_scale else errors).argmin(0)
    codes, shift = (torch.cat([d[i] for d in done], 1)[best, torch.arange(len(weight))] for i in (1, 2))
    scale = scale * torch.tensor(FACTORS)[best, None]
    starts = [lo * columns for lo, _ in layer.ranges]
    for index, (quantizer, start, width) in enumerate(zip(quantizers, starts, widths.tolist(), strict=True)):
        assert quantizer.zero_point is not None
        part = codes[:, start : start + width].reshape(layer.part(index).shape).to(torch.int32)
        own = scale[: 1 if shared_scale else None, start].contiguous()
        layer.assign(index, part, own, quantizer.zero_point)
    if layer.shift is not None and any(m.centred for m in found):
        layer.shift.copy_(shift)


def _candidates(
    weight: Tensor, scale: Tensor, zero_point: Tensor, known: Moments, damping: float, qtype: QType
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each scale factor: errors [F, O], codes [F, O, K] and bias corrections [F, O]."""
    count, target = len(FACTORS), compensated(weight, known.hessian, known.cross, damping)
    factor = torch.tensor(FACTORS).repeat_interleave(len(weight))[:, None]
    scale, zero_point, target = scale.repeat(count, 1) * factor, zero_point.repeat(count, 1), target.repeat(count, 1)
    codes = gptq(target, known.hessian, scale, zero_point, qtype)
    rounded = (codes - zero_point) * scale
    errors = layer_error(target - rounded, known.hessian)
    shift = (known.lost + weight @ known.mean).repeat(count) - rounded @ known.mean
    return errors.view(count, -1), codes.view(count, len(weight), -1), shift.view(count, -1)
