"""The published reconstruction loop (BRECQ, Q-Diffusion), written plainly: what ``bench_engine.py`` measures against.

Composed torch ops for fake quantization and AdaRound, NCHW float32, and for each block two passes over the model that
cache its inputs (quantized prefix) and targets (full precision). Blocks, layers, bits, first intervals, batch size and
data are those of our engine; the layers' shells (:class:`~ptq_tdq.modules.QuantLayer`) only call what is put into them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ptq_tdq.recon.parts import Parts
from ptq_tdq.recon.streams import UnitCall
from ptq_tdq.recon.unit import Unit
from ptq_tdq.search import QParams

ZETA, GAMMA = 1.1, -0.1
WEIGHT_LR, INTERVAL_LR = 1e-3, 4e-4
WARMUP, B_START, B_END, ROUNDING_LOSS = 0.2, 20.0, 2.0, 0.01


def round_ste(x: Tensor) -> Tensor:
    """Rounding whose gradient is 1."""
    return (x.round() - x).detach() + x


class PublishedRounding(nn.Module):
    """AdaRound as composed ops; everything is computed anew in each forward pass."""

    def __init__(self, weight: Tensor, scale: Tensor, zero_point: Tensor, levels: int) -> None:
        super().__init__()
        self.weight, self.scale, self.zero_point, self.levels = weight, scale, zero_point, levels
        rest = weight / scale - (weight / scale).floor()
        self.alpha = nn.Parameter(-torch.log((ZETA - GAMMA) / (rest - GAMMA) - 1))
        self.soft = True

    def targets(self) -> Tensor:
        return torch.clamp(torch.sigmoid(self.alpha) * (ZETA - GAMMA) + GAMMA, 0, 1)

    def soft_weight(self) -> Tensor:
        up = self.targets() if self.soft else (self.alpha >= 0).float()
        codes = torch.clamp(torch.floor(self.weight / self.scale) + up + self.zero_point, 0, self.levels - 1)
        return (codes - self.zero_point) * self.scale


class PublishedQuantizer(nn.Module):
    """One learned static interval per tensor, as composed ops with a straight-through rounding."""

    def __init__(self, scale: Tensor, zero_point: Tensor, levels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(scale.detach().clone())
        self.zero_point, self.levels = zero_point, levels

    def forward(self, x: Tensor) -> Tensor:
        codes = torch.clamp(round_ste(x / self.scale) + self.zero_point, 0, self.levels - 1)
        return (codes - self.zero_point) * self.scale


def published_copy(unit: Unit) -> Unit:
    """A copy of the unit that shares nothing which learning changes."""
    module = copy.deepcopy(unit.module)
    module.__dict__.pop("forward", None)  # the sweep's interception, which would call the original
    return replace(unit, module=module)


def loss_of(unit: Unit, call: UnitCall, target: Parts, power: float, index: Tensor) -> Tensor:
    """``|output - target|^power`` for some samples: summed over dim 1, the mean over the rest."""
    found = call.output(unit.run(call, index), index).real(slice(0, len(index)))
    parts = [(a - b).abs().pow(power).sum(1).mean() for a, b in zip(found, target.real(index), strict=True)]
    return torch.stack(parts).sum()


def learn_weights(
    unit: Unit, call: UnitCall, target: Parts, iterations: int, batch: int, generator: torch.Generator
) -> None:
    """Phase W of one unit, whose layers have their first intervals already."""
    roundings = []
    for layer in unit.layers():
        layer.weights_enabled = True
        for index, quantizer in enumerate(layer.weight_quantizers()):
            rounding = PublishedRounding(layer.part(index), *quantizer.grid(), quantizer.qtype.qmax + 1)
            quantizer.rounding = rounding  # type: ignore[assignment]
            roundings.append(rounding)
    optimizer = torch.optim.Adam([r.alpha for r in roundings], lr=WEIGHT_LR)
    with torch.enable_grad():
        for iteration in range(iterations):
            rows = torch.randperm(len(unit.t), generator=generator)[:batch]
            optimizer.zero_grad()
            loss = loss_of(unit, call, target, 2.0, rows)
            if iteration >= WARMUP * iterations:
                b = B_END + (B_START - B_END) * max(0.0, 1 - (iteration / iterations - WARMUP) / (1 - WARMUP))
                for rounding in roundings:
                    loss = loss + ROUNDING_LOSS * (1 - ((rounding.targets() - 0.5).abs() * 2).pow(b)).sum()
            loss.backward()
            optimizer.step()
    for rounding in roundings:
        rounding.soft = False


def replace_quantizers(unit: Unit, static: dict[str, QParams]) -> list[nn.Parameter]:
    """Put composed quantizers with the given first intervals into the unit; returns what is learned."""
    found = []
    for child in unit.quantizers():
        start = static[child.record.name]
        quantizer = PublishedQuantizer(start.scale, start.zero_point, child.qtype.qmax + 1)
        child.enabled = True
        child.forward = quantizer.forward  # type: ignore[method-assign, assignment]
        found.append(quantizer.scale)
    return found


def learn_activations(
    unit: Unit, call: UnitCall, target: Parts, scales: list[nn.Parameter], iterations: int, batch: int,
    generator: torch.Generator, power: float,
) -> None:  # fmt: skip
    """Phase A of one unit: Adam with cosine decay on the intervals; nothing to do where only weights are quantized."""
    if not scales:
        return
    optimizer = torch.optim.Adam(scales, lr=INTERVAL_LR)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(iterations, 1))
    with torch.enable_grad():
        for _ in range(iterations):
            index = torch.randperm(len(unit.t), generator=generator)[:batch]
            optimizer.zero_grad()
            loss: Tensor = loss_of(unit, call, target, power, index)
            loss.backward()
            optimizer.step()
            schedule.step()


class _Reached(Exception):
    pass


def cache_pass(module: nn.Module, forwards: Iterable[Callable[[], Any]]) -> None:
    """One partial pass over the model as the published code makes it: each chunk stops behind ``module``."""

    def stop(*_: Any) -> None:
        raise _Reached

    with torch.no_grad(), module.register_forward_hook(stop):
        for forward in forwards:
            with suppress(_Reached):
                forward()
