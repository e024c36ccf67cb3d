"""Transforms of a linear layer's input that its weight undoes: channels divided by factors, or a rotation.

    W x = (W diag(f)) (diag(1 / f) x),    f_c = |x_c|^a, a power of two

(Channel equalization: SmoothQuant, arXiv 2211.10438; the rotation is that of :mod:`ptq_tdq.rotate`.) A few channels of
a transformer are many times larger than the others, and one interval for all leaves the small ones few codes. How much
the weight can take over depends on both bit widths, so the exponent a of each layer is the one with the least error of
its outputs, on tokens that the factors were not made from. All steps count alike, whatever the size of their
activations (PTQ4DiT, arXiv 2405.16005, weighs them too). Powers of two change no digit of the layer's output in
floating point.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ptq_tdq import processes
from ptq_tdq.affine import fake_quantize
from ptq_tdq.config import Config
from ptq_tdq.hooks import hooked
from ptq_tdq.intervals import source_class
from ptq_tdq.modules import QuantLayer
from ptq_tdq.modules.layers import layer_input
from ptq_tdq.recon.streams import UnitCall
from ptq_tdq.recon.unit import Unit, as_slice
from ptq_tdq.rotate import rotated
from ptq_tdq.search import QParams, row_qparams, vector_qparams

EXPONENTS = (0.0, 0.25, 0.5, 0.75)
ROWS = 2048  # tokens of a layer that are looked at, about
MARGIN = 0.1  # of the error: a rotation costs a pass at run time
LEAST = 64  # fewer tell nothing
JUDGE = 4  # one in so many tokens judges the factors that the others give
SEARCHED = 1 << 14  # of their values, to find an interval
TINY = torch.finfo(torch.float32).tiny


def transform_unit(unit: Unit, call: UnitCall, config: Config, generator: torch.Generator) -> None:
    """Transform the inputs of the unit's linear layers by what these are given, before any weight is rounded.

    With ``equalize`` "channels" they are equalized; with ``rotate`` "auto", those are rotated instead for which that
    leaves less error by more than ``MARGIN``.
    """
    layers = [layer for layer in unit.layers() if layer.mixable and not layer.record.rotated]
    if not layers:
        return
    for layer, (x, number) in _inputs(unit, layers, call, generator).items():
        if len(x) < LEAST:  # an expert that hardly anything is sent to
            continue
        divisor, turned = best_transform(layer, x, number, config)
        if turned:
            layer.record = replace(layer.record, rotated=True)
        elif bool((divisor != 1).any()):
            layer.equalize(divisor)


def best_transform(layer: QuantLayer, x: Tensor, number: Tensor, config: Config) -> tuple[Tensor, bool]:
    """The factors [C] of the best exponent for rows ``x`` [n, C] at the steps ``number`` [n]; or to rotate instead."""
    weight, judge = layer.part(0), torch.arange(len(x), device=x.device) % JUDGE == 0
    learned, judged = x[~judge], x[judge]
    target, size = judged @ weight.t(), _size(learned, number[~judge])
    energy = _of_steps(target.square().mean(1), number[judge])[number[judge]].clamp(min=TINY)

    def error(seen: Tensor, given: Tensor, moved: Tensor) -> float:
        output = _quantized_input(layer, seen, given) @ _quantized_weight(layer, moved, config).t()
        return float(((output - target).square().mean(1) / energy).mean())

    best, least = torch.ones_like(size), torch.inf
    for exponent in EXPONENTS if config.weights.equalize == "channels" else EXPONENTS[:1]:
        divisor = power_of_two(size**exponent)
        found = error(learned / divisor, judged / divisor, weight * divisor)
        if found < least:
            best, least = divisor, found
    turns = config.weights.rotate == "auto"
    return best, turns and error(rotated(learned), rotated(judged), rotated(weight)) < (1 - MARGIN) * least


def power_of_two(size: Tensor) -> Tensor:
    """The powers of two nearest to sizes [C], in their geometric mean's unit."""
    exponent = size.clamp(min=TINY).log2()
    return (exponent - exponent.mean()).round().clamp(-16, 16).exp2()


def _size(x: Tensor, number: Tensor) -> Tensor:
    """The size of each channel [C]: root mean squares of the steps' own, each in the unit of its step."""
    square = _of_steps(x.square(), number)
    return (square / square.mean(1, keepdim=True).clamp(min=TINY)).mean(0).sqrt()


def _of_steps(values: Tensor, number: Tensor) -> Tensor:
    """Means of rows [n, ...] by their step: [K, ...]."""
    count = int(number.max()) + 1
    sums = values.new_zeros(count, *values.shape[1:]).index_add_(0, number, values)
    rows = torch.bincount(number, minlength=count).clamp(min=1)
    return sums / rows.view(-1, *(1,) * (values.ndim - 1))


def _quantized_input(layer: QuantLayer, x: Tensor, judged: Tensor) -> Tensor:
    """Rows ``judged`` behind a quantizer whose interval is that of ``x``, or of each of them."""
    record, qtype = layer.record.inputs[0], layer.activation_quantizers()[0].qtype
    if source_class(record.method).by_token:
        found = vector_qparams(judged, qtype)
        found = QParams(found.scale[:, None], found.zero_point[:, None])
    else:
        flat = x.flatten()
        found = row_qparams(flat[None, :: (len(flat) // SEARCHED) | 1], qtype)
    return fake_quantize(judged, found.scale, found.zero_point, qtype)


def _quantized_weight(layer: QuantLayer, weight: Tensor, config: Config) -> Tensor:
    qtype = layer.weight_quantizers()[0].qtype
    found = row_qparams(weight, qtype, method="minmax", symmetric=config.symmetric_weights(qtype.bits))
    return fake_quantize(weight, found.scale[:, None], found.zero_point[:, None], qtype)


def _inputs(
    unit: Unit, layers: list[QuantLayer], call: UnitCall, generator: torch.Generator
) -> dict[QuantLayer, tuple[Tensor, Tensor]]:
    """Some tokens [n, C] that each layer gets, and the number of their time steps [n]."""
    each = -(-ROWS // len(unit.t))
    number = torch.unique(unit.t, return_inverse=True)[1]
    found: dict[QuantLayer, list[tuple[Tensor, Tensor]]] = {layer: [] for layer in layers}

    def keep(steps: Tensor, layer: QuantLayer, rows: Tensor) -> None:
        wanted = each * len(steps)
        index = torch.randint(len(rows), (wanted if len(rows) else 0,), generator=generator)
        own = steps[index * len(steps) // len(rows)] if len(rows) else steps[:0]
        found[layer].append((rows[index.to(rows.device)].float(), own.to(rows.device)))

    def look(sample: Tensor) -> int:
        counts: list[int] = []
        _run(unit, layers, call, sample, lambda layer, rows: counts.append(len(rows)))
        return sum(tokens > 0 for tokens in counts)

    for batch, here, calls in unit.turns(look):
        if len(here):
            _run(unit, layers, call, as_slice(here), partial(keep, number[here]))
        torch.randint(2, (calls * each * (len(batch) - len(here)),), generator=generator)  # as others draw
    processes.follow(generator)
    return {layer: _joined(layer, processes.gather(parts)) for layer, parts in found.items()}


def _run(
    unit: Unit,
    layers: list[QuantLayer],
    call: UnitCall,
    index: slice | Tensor,
    keep: Callable[[QuantLayer, Tensor], None],
) -> None:
    """Run the unit on some samples; ``keep`` gets each layer that runs with its tokens [n, C]."""

    def listen(layer: QuantLayer, args: Any, kwargs: Any) -> None:
        x = layer_input(args, kwargs)
        assert x is not None
        keep(layer, x.detach().reshape(-1, x.shape[-1]))

    with torch.no_grad(), hooked(layer.register_forward_pre_hook(listen, with_kwargs=True) for layer in layers):
        unit.run(call, index)


def _joined(layer: QuantLayer, parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    if not parts:
        return layer.weight.new_empty(0, layer.weight.shape[1]), torch.empty(0, dtype=torch.int64)
    x, number = (torch.cat(pieces).to(layer.weight.device) for pieces in zip(*parts, strict=True))
    return x, number
