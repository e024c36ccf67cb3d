"""Rounding of a unit's weights in closed form, layer after layer: compensation for the quantized inputs, then GPTQ."""

from __future__ import annotations

import torch
from torch import Tensor

from ptq_tdq import processes
from ptq_tdq.config import Config
from ptq_tdq.gptq import absorbed, compensated, gptq, layer_error, nearest, solve_order
from ptq_tdq.modules import QuantLayer
from ptq_tdq.recon.moments import Inputs, inputs
from ptq_tdq.recon.parts import Parts
from ptq_tdq.recon.streams import UnitCall
from ptq_tdq.recon.unit import Unit
from ptq_tdq.recon.visits import visiting
from ptq_tdq.scheme import QType

FACTORS = (1.06, 1.0, 0.95, 0.9, 0.85)  # of the first scales; each output channel keeps the best
PIECE = 1 << 23  # weights, with all factors, that are rounded at once


def round_unit(unit: Unit, full: UnitCall, mine: UnitCall, config: Config, generator: torch.Generator) -> Parts | None:
    """Give each layer of the unit, whose first intervals are known, its codes, scales and bias correction.

    A layer sees the inputs that the quantized layers before it, in the unit and before it, have left. Returns the
    unit's outputs; None where these inputs were not right, as runs of the unit that ``unit.waiting`` let wait have
    disturbed each other.
    """
    for layer in unit.layers():
        layer.weights_enabled = False
    factors = FACTORS if config.weights.weight_granularity == "per_channel" else (1.0,)
    with visiting(unit, full, mine) as visits:
        for layers in visits.groups:
            found = inputs(visits, layers, generator)
            for layer in layers:
                with torch.no_grad():
                    _round(layer, found.pop(0), config, factors)
                layer.weights_enabled = True
        return visits.outputs()


def _round(layer: QuantLayer, found: list[Inputs], config: Config, factors: tuple[float, ...]) -> None:
    weight, quantizers, device = layer.weight.flatten(1).float(), layer.weight_quantizers(), layer.weight.device
    centred = layer.shift is not None and config.learning.bias_lr > 0
    columns = [layer.part(index)[0].numel() for index in range(len(quantizers))]  # of each range, next to each other
    part = torch.arange(len(columns), device=device).repeat_interleave(torch.tensor(columns, device=device))
    scale, zero_point = (
        torch.stack([getattr(q, key).expand(len(weight)) for q in quantizers], 1) for key in ("scale", "zero_point")
    )
    codes, shift = torch.empty_like(weight, dtype=torch.uint8), torch.empty_like(weight[:, 0])
    for rows, known in zip(torch.arange(len(weight), device=device).chunk(len(found)), found, strict=True):
        codes[rows], scale[rows], shift[rows] = _solve(
            known.close(centred=centred), weight[rows], scale[rows], zero_point[rows], part,
            taps=weight[0].numel() // layer.weight.shape[1],
            qtype=quantizers[0].qtype, damping=config.weights.damping, factors=factors,
        )  # fmt: skip
    for index, (quantizer, of_part) in enumerate(zip(quantizers, codes.split(columns, 1), strict=True)):
        assert quantizer.scale is not None and quantizer.zero_point is not None
        own_scale = scale[:, index][: len(quantizer.scale)].contiguous()
        layer.assign(index, of_part.reshape(layer.part(index).shape), own_scale, quantizer.zero_point)
    if layer.shift is not None and centred:
        layer.shift.copy_(shift)


def _solve(
    known: Inputs, weight: Tensor, scale: Tensor, zero_point: Tensor, part: Tensor, *, taps: int, qtype: QType,
    damping: float, factors: tuple[float, ...],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Codes [O, K] of a weight [O, K], its scales [O, P] as they have become, and what its mean outputs lack [O].

    ``part`` [K] is the channel range of each column. Columns are solved for block after block; each block makes up for
    what those before it have lost, as each layer does. The first one chooses the factor of a row's scales.
    """
    codes, lost = torch.empty_like(weight, dtype=torch.uint8), known.lost
    mine = processes.share(len(weight))  # the rows of a weight are rounded apart from each other
    for columns in known.blocks(taps):
        hessian, crosses = known.moments(columns)
        better, found, factor = _solve_rows(
            weight[mine, columns], hessian, [cross[mine] for cross in crosses], scale[mine], zero_point[mine],
            part[columns], qtype, damping, factors,
        )  # fmt: skip
        codes[:, columns] = processes.join_rows(found)
        scale = _times(scale, processes.join_rows(factor)[:, None])
        own, rounded = weight[:, columns], (codes[:, columns] - zero_point[:, part[columns]]) * scale[:, part[columns]]
        lost = lost + (own - rounded).double() @ known.mean[columns]
        if columns.stop < weight.shape[1]:
            better = processes.join_rows(better)
            known.solved(columns, better - own, better - rounded)
        factors = (1.0,)
    return codes, scale, lost.float()


def _solve_rows(
    weight: Tensor, hessian: Tensor, crosses: list[Tensor], scale: Tensor, zero_point: Tensor, part: Tensor,
    qtype: QType, damping: float, factors: tuple[float, ...],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Of a block of columns: the compensated weight [R, k], its codes, and the factor [R] of the scales."""
    solve, (cross, *earlier) = solve_order(hessian), crosses
    better = compensated(weight, hessian, cross, damping)
    target = better + sum(absorbed(of_blocks, solve) for of_blocks in earlier)
    codes, factor = torch.empty_like(weight, dtype=torch.uint8), torch.empty_like(weight[:, 0])
    size = max(1, PIECE // len(factors) // len(hessian))  # of what is rounded at once, which bounds the memory
    for start in range(0, len(weight), size):
        rows = slice(start, start + size)
        codes[rows], factor[rows] = _best_codes(
            target[rows], hessian, solve, scale[rows], zero_point[rows], part, qtype, factors
        )
    return better, codes, factor


def _times(scale: Tensor, factor: Tensor | float) -> Tensor:
    """``scale * factor``, never subnormal: some threads flush such numbers to 0."""
    return (scale * factor).clamp(min=torch.finfo(torch.float32).tiny)


def _best_codes(
    target: Tensor, hessian: Tensor, solve: tuple[Tensor, Tensor, Tensor], scale: Tensor, zero_point: Tensor,
    part: Tensor, qtype: QType, factors: tuple[float, ...],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Codes [R, K] of the rows ``target`` [R, K], and the factor [R] of the scales [R, P] that gave the least error.

    GPTQ is greedy, so rounding to nearest (with the scales as they are) competes too: the error is never above that.
    """
    rows, zero_points = torch.arange(len(target), device=target.device), zero_point[:, part]
    scales = torch.stack([_times(scale, factor)[:, part] for factor in factors])
    codes, errors = gptq(target, solve, scales, zero_points, qtype)
    alone = nearest(target, scale[:, part], zero_points, qtype)
    errors_alone = layer_error(target - (alone - zero_points) * scale[:, part], hessian)
    least, best = errors.min(0)
    chosen = torch.where((errors_alone < least)[:, None], alone.float(), codes[best, rows])
    factor = torch.tensor(factors, device=best.device)[best]
    return chosen.to(torch.uint8), torch.where(errors_alone < least, 1.0, factor)
