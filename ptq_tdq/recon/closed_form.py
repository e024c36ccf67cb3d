"""Rounding of a unit's weights in closed form, layer after layer: compensation for the quantized inputs, then GPTQ."""

from __future__ import annotations

import torch
from torch import Tensor

from ptq_tdq.config import Config
from ptq_tdq.gptq import compensated, gptq, layer_error, nearest, solve_order
from ptq_tdq.modules import QuantLayer
from ptq_tdq.recon.moments import Moments, moments
from ptq_tdq.recon.streams import UnitCall
from ptq_tdq.recon.unit import Unit
from ptq_tdq.scheme import QType

FACTORS = (1.06, 1.0, 0.95, 0.9, 0.85)  # of the first scales; each output channel keeps the best
PIECE = 1 << 21  # weights, with all factors, that are rounded at once


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
            _round(layer, found, config.damping, FACTORS if config.weight_granularity == "per_channel" else (1.0,))
        layer.weights_enabled = True


def _round(layer: QuantLayer, found: list[Moments], damping: float, factors: tuple[float, ...]) -> None:
    weight, quantizers, device = layer.weight.flatten(1).float(), layer.weight_quantizers(), layer.weight.device
    columns = [layer.part(index)[0].numel() for index in range(len(quantizers))]  # of each range, next to each other
    widths = torch.tensor(columns, device=device)
    scale, zero_point = (
        torch.stack([getattr(q, key).expand(len(weight)) for q in quantizers], 1) for key in ("scale", "zero_point")
    )
    codes, best, shift = torch.empty_like(weight), torch.empty_like(weight[:, 0]), torch.empty_like(weight[:, 0])
    for rows, known in zip(torch.arange(len(weight), device=device).chunk(len(found)), found, strict=True):
        target = compensated(weight[rows], known.hessian, known.cross, damping)
        inverse = solve_order(known.hessian)
        # the rows of a weight are rounded apart from each other: some at a time, which bounds the memory
        for some in torch.arange(len(rows), device=device).split(max(1, PIECE // (len(factors) * weight.shape[1]))):
            own = rows[some]
            codes[own], best[own] = _best_codes(
                target[some], known, inverse, scale[own], zero_point[own], widths, quantizers[0].qtype, factors
            )
        scales = _times(scale[rows], best[rows, None]).repeat_interleave(widths, 1)
        rounded = (codes[rows] - zero_point[rows].repeat_interleave(widths, 1)) * scales
        shift[rows] = (known.lost + (weight[rows] - rounded).double() @ known.mean).float()
    for index, (quantizer, part) in enumerate(zip(quantizers, codes.split(columns, 1), strict=True)):
        assert quantizer.scale is not None and quantizer.zero_point is not None
        part = part.reshape(layer.part(index).shape).to(torch.int32)
        own_scale = _times(scale[:, index], best)[: len(quantizer.scale)].contiguous()
        layer.assign(index, part, own_scale, quantizer.zero_point)
    if layer.shift is not None and found[0].centred:
        layer.shift.copy_(shift)


def _times(scale: Tensor, factor: Tensor | float) -> Tensor:
    """``scale * factor``, never subnormal: some threads flush such numbers to 0."""
    return (scale * factor).clamp(min=torch.finfo(torch.float32).tiny)


def _best_codes(
    target: Tensor, known: Moments, inverse: tuple[Tensor, Tensor], scale: Tensor, zero_point: Tensor, widths: Tensor,
    qtype: QType, factors: tuple[float, ...],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Codes [R, K] of the rows ``target`` [R, K], and the factor [R] of the scales [R, P] that gave the least error.

    GPTQ is greedy, so rounding to nearest competes too: the error is never above what that leaves.
    """
    rows, count = len(target), len(factors)
    scales = torch.cat([_times(scale, factor) for factor in factors]).repeat_interleave(widths, 1)
    zero_points, targets = zero_point.repeat(count, 1).repeat_interleave(widths, 1), target.repeat(count, 1)
    found = gptq(targets, *inverse, scales, zero_points, qtype), nearest(targets, scales, zero_points, qtype)
    codes = torch.stack(found)
    errors = layer_error((targets - (codes - zero_points) * scales).flatten(0, 1), known.hessian).view(-1, rows)
    best = errors.argmin(0)
    chosen = codes.view(2 * count, rows, -1)[best, torch.arange(rows, device=best.device)]
    return chosen.float(), torch.tensor(factors, device=best.device)[best % count]
