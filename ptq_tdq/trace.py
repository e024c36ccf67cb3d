"""What a denoiser does in one call, by watching it: its layers in order, its attention products, what depends on what.

Seven forward passes on recorded calls tell everything that the plan needs, so nothing about any model family is written
down: two rows against one, and several, tell which tensors have rows; another x, another t, another condition tell what
each layer's input depends on. Where one row does not reach all layers, as where each has experts of its own, more rows
are looked at.
"""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ptq_tdq.calls import Calls, Each, Group, Place, fresh, main_argument, prediction
from ptq_tdq.calls.arguments import REFUSALS
from ptq_tdq.calls.gradients import without_gradients
from ptq_tdq.calls.outputs import last_row
from ptq_tdq.carried import refuse_carried
from ptq_tdq.errors import ModelError, first_line
from ptq_tdq.modules.layers import layer_kind
from ptq_tdq.watch import Print, Run, Source, TracedLayer, Watcher

SEVERAL, MOST = 8, 64  # rows of one call, and of all where rows may go different ways
_CLOSE = 0.02  # relative difference of one row computed alone and beside another


@dataclass
class Trace:
    """All that was seen.

    ``called`` counts the calls of each module, by name. ``products`` counts the attention products of each module that
    computes some, ``mixed`` are those modules whose products do not have the rows of one sample after the other. By the
    module that computes them, ``matmuls`` are multiply-accumulates of other products of two activations, ``loose``
    those with weights that no layer holds, and ``fused`` those of torch's multi-head attention, whose projections
    and products are one function. ``elsewhere`` are layers that other calls reach and the first does not; ``unused``
    are layers that were never called and whose weight no such function took. With ``shared_time`` a sample's prediction
    changes with the time step of another one in its batch.
    """

    layers: dict[str, TracedLayer]
    called: Counter[str]
    products: dict[str, int]
    mixed: set[str]
    matmuls: dict[str, int]
    loose: dict[str, int]
    fused: dict[str, int]
    elsewhere: dict[str, TracedLayer]
    unused: list[str]
    shared_time: bool

    @property
    def faithful(self) -> list[str]:
        """The layers that compute the plain operation on their weight, for rows, in order."""
        return [name for name, layer in self.layers.items() if layer.faithful and not layer.unbatched]

    @property
    def macs(self) -> int:
        """All multiply-accumulates with weights, and those of fused attention; at least 1."""
        others = sum(self.loose.values()) + sum(self.fused.values())
        return max(1, others + sum(layer.macs for layer in self.all_layers.values()))

    @property
    def all_layers(self) -> dict[str, TracedLayer]:
        """Those that any of the calls reaches."""
        return self.layers | self.elsewhere


def trace(model: nn.Module, calls: Calls) -> Trace:
    """Watch ``model`` on rows of ``calls``; raises :class:`ModelError` where it refuses a few rows of them."""
    group = calls.groups[0]
    pair = _pair(group, calls.axis.argument)
    one, two = (group.arguments(index) for index in (pair[:1], pair))
    watcher = Watcher(model)
    try:
        with without_gradients(model):
            alone = watcher.look(one)
        together = watcher.look(two, again=True, rows=2)
        beside = last_row(watcher.output)
        several = _several(watcher, group, alone, len(group.leaf(calls.axis.argument)))
    except REFUSALS as error:
        said = first_line(error)
        raise ModelError(f"{type(model).__name__} refuses the recorded calls ({said}); record its own.") from error
    for name in [name for name in watcher.layers if name not in together.inputs]:  # chosen by the t of all samples
        watcher.elsewhere[name] = watcher.layers.pop(name)
    varied = _varied(watcher, alone, _variations(calls, group, one, watcher.output))
    runs = [*several, *varied]
    for name, layer in watcher.layers.items():
        found = [(run.inputs.get(name, []), run.rows) for run in runs]
        layer.rows = _rows(alone.inputs[name], together.inputs[name], found)
    mixed = set[str]()
    for name, of in alone.products.items():
        found = [(run.products.get(name, []), run.rows) for run in runs]
        if _rows(of, together.products.get(name, []), found) is None:
            mixed.add(name)
    unused = [name for name, module in model.named_modules() if layer_kind(module) and not watcher.saw(name, module)]
    for another in calls.groups[1:] if unused else ():
        with suppress(*REFUSALS):
            watcher.look(another.arguments(pair[:1]), again=True)
    matmuls, loose = _others(alone, varied)
    return Trace(
        watcher.layers,
        watcher.called,
        {name: len(of) for name, of in alone.products.items() if name in together.products},
        mixed,
        matmuls,
        loose,
        watcher.fused,
        watcher.elsewhere,
        [name for name in unused if not watcher.saw(name, watcher.modules[name])],
        _shares_time(model, two, calls.axis.argument, beside),
    )


def _pair(group: Group, time: str) -> Tensor:
    """The numbers of the first row and of another one, as far from it in time as any."""
    leaf = group.leaf(time)
    return torch.tensor([0, int(_distances(leaf, leaf[:1]).argmax()) or len(leaf) - 1])


def _several(watcher: Watcher, group: Group, alone: Run, count: int) -> list[Run]:
    """Runs of some of all ``count`` rows; one where the first row ``alone`` reaches all layers that they do."""
    runs: list[Run] = []
    reached = {name for name, of in alone.inputs.items() if of[0].numbers}  # experts may get no rows
    numbers = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    for rows in torch.split(numbers[:MOST], SEVERAL):
        runs.append(watcher.look(group.arguments(rows), again=True, rows=len(rows)))
        if all(name in reached for name, module in watcher.modules.items() if layer_kind(module)):
            break
    return runs


def _shares_time(model: nn.Module, two: dict[str, Any], time: str, beside: Tensor) -> bool:
    """Whether what the second of ``two`` rows gets, ``beside`` the first, changes with the first one's time step.

    Code that reads the last row's t is not found, nor what t changes little.
    """
    own = two[time]

    def changes(t: Tensor) -> bool:
        found = last_row(model(**fresh({**two, time: t})))
        return bool((found - beside).float().norm() > _CLOSE * beside.float().norm())

    with without_gradients(model), torch.no_grad(), suppress(*REFUSALS):
        return changes(own[-1:].expand_as(own).clone()) and not changes(own)  # which a model that draws noise does
    return False


def _varied(watcher: Watcher, alone: Run, variations: dict[Source, dict[str, Any]]) -> list[Run]:
    """Runs with one thing changed; what each layer's input depends on is told by them."""
    runs: list[Run] = []
    for source, changed in variations.items():
        with suppress(*REFUSALS):  # not every other value is one that it takes
            runs.append(watcher.look(changed, again=True))
            for name, layer in watcher.layers.items():
                if runs[-1].inputs.get(name, [])[:1] != alone.inputs[name][:1]:
                    layer.sources.add(source)
    return runs


def _distances(rows: Tensor, row: Tensor) -> Tensor:
    return (rows.double() - row.to(rows.device)).abs().reshape(len(rows), -1).sum(1)


def _others(alone: Run, varied: list[Run]) -> tuple[Counter[str], Counter[str]]:
    """Multiply-accumulates of products of activations, and of those with a weight: all but one operand is the same in
    each call, or a parameter is among them.
    """
    matmuls, loose = Counter[str](), Counter[str]()
    for owner, products in alone.others.items():
        for place, product in enumerate(products):
            others = [of[place].operands for run in varied if len(of := run.others.get(owner, [])) > place]
            moving = sum(len(set(prints)) > 1 for prints in zip(product.operands, *others, strict=False))
            if product.held or moving == 1:
                loose[owner] += product.macs
            elif moving:
                matmuls[owner] += product.macs
    return matmuls, loose


def _rows(alone: list[Print], together: list[Print], others: list[tuple[list[Print], int]]) -> int | None:
    """Rows for each sample, from the same tensors with the first sample, with two, and with other numbers of samples
    (none where these do not get there); None where there are none, or not as many for each.
    """
    if len(alone) != len(together) or not all(map(_first_half, alone, together)):
        return None
    if any(y.shape[:1] != (count * x.shape[0],) for found, count in others for x, y in zip(alone, found, strict=False)):
        return None
    return alone[0].shape[0]


def _first_half(one: Print, two: Print) -> bool:
    if not one.shape or two.shape[:1] != (2 * one.shape[0],):
        return False
    if one.shape[1:] != two.shape[1:] or not one.numbers:  # padded to another length
        return True
    _, squares, *ends = one.numbers
    _, other_squares, *other_ends = two.half
    size = (squares / max(1, torch.Size(one.shape).numel())) ** 0.5
    differ = any(abs(a - b) > _CLOSE * (size + abs(a)) for a, b in zip(ends, other_ends, strict=True))
    return not (differ or abs(squares - other_squares) > _CLOSE * squares)  # NaN tells nothing


def _variations(calls: Calls, group: Group, one: dict[str, Any], output: Any) -> dict[Source, dict[str, Any]]:
    """The call ``one`` with another x, another t, and another condition (where there is one to vary)."""
    time = calls.axis.argument
    main = _denoised(one, time, prediction(output))
    other = {name: _other_rows(group, tree, one[name]) for name, tree in group.tree.items() if name != time}
    return {
        "x": {**one, main: other.pop(main)},
        "t": {**one, time: _other_time(group, time, one[time])},
        "condition": {**one, **other},
    }


def _denoised(arguments: dict[str, Any], time: str, output: Tensor) -> str:
    """The first argument that has a dimension of the output's behind that of the samples, as no label has."""
    for name, value in arguments.items():
        tensors = [x for x in pytree.tree_leaves(value) if isinstance(x, Tensor)]
        if name != time and any(a == b for x in tensors for a, b in zip(x.shape[1:], output.shape[1:], strict=False)):
            return name
    return main_argument(arguments, time)


def _other_values(leaf: Any) -> Any:
    """Values of the same size that are not the same."""
    return leaf.roll(1, -1) * -0.9 + 0.01 if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def _other_time(group: Group, name: str, value: Tensor) -> Tensor:
    leaf = group.leaf(name)
    distance = _distances(leaf, value)
    if bool(distance.any()):
        return leaf[distance.argmax()][None].to(value.device)
    return value / 2 if value.is_floating_point() else value // 2 + (value < 2)


def _other_rows(group: Group, tree: Any, value: Any) -> Any:
    """Each leaf of one argument from a row where it differs; real numbers that never differ are changed."""

    def other(place: Any, now: Any) -> Any:
        if not isinstance(place, Place):
            return now
        rows = group.rows[place.index]
        if isinstance(rows, Each):
            return [_other_values(x) for x in now]
        known = now.to(rows.device).reshape(1, -1)
        differs = (rows.reshape(len(rows), -1) != known).any(1)
        if bool(differs.any()):
            return rows[differs][:1].to(now.device).reshape(now.shape)
        binary = bool(((now == 0) | (now == 1)).all())
        return now if binary else _other_values(now)

    leaves, spec = pytree.tree_flatten(tree)
    values = spec.flatten_up_to(value)
    return pytree.tree_unflatten([other(p, v) for p, v in zip(leaves, values, strict=True)], spec)


def require_rows(model: nn.Module, calls: Calls) -> None:
    """Raise :class:`ModelError` for a model that does not take one time step per row, or rows of other calls."""
    refuse_carried(model, calls)
    group, time = calls.groups[0], calls.axis.argument
    for count in (2, 3):  # one of them is no number of its features, over which a time could be spread unnoticed
        try:
            with without_gradients(model):
                model(**group.arguments(torch.zeros(count, dtype=torch.int64)))
        except REFUSALS as error:
            raise ModelError(
                f"{type(model).__name__} cannot be called with {count} rows of the recorded calls at once and "
                f"{time} a tensor with one value for each ({first_line(error)}); calibration needs such batches. "
                f"Where {time} is what does not fit, spread it over the other dimensions: {time}.view(-1, 1, 1, 1)."
            ) from error
