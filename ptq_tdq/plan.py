"""What to quantize: what was seen of the model's calls, and the choices of the config, give the records of all layers.

Nothing depends on a model family: order, roles, concatenations and attention products are observed, units come from the
model's own structure. One name is looked up: a shortcut is a layer called ``conv_shortcut``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import accumulate
from types import FunctionType

from torch import nn

from ptq_tdq.calls import Calls
from ptq_tdq.config import Config, Role
from ptq_tdq.errors import ModelError
from ptq_tdq.identity import dtype_name
from ptq_tdq.modules import layer_kind
from ptq_tdq.modules.layers import own_weight
from ptq_tdq.modules.products import ATTRIBUTE, OPERANDS
from ptq_tdq.records import NAMED, LayerRecord, QuantizerRecord
from ptq_tdq.trace import Trace, require_rows, trace
from ptq_tdq.units import find_units
from ptq_tdq.watch import TracedLayer

SHORTCUT = "conv_shortcut"


@dataclass(frozen=True)
class Special:
    """Names of units that are not reconstructed as others are.

    ``single`` are those with quantizers whose rows cannot be told apart by sample (experts, sequences first): they run
    with one time step at a time; ``unlearned`` those that are quantized and not reconstructed; ``repeated`` those that
    run several times in a call, where inputs of the first time tell little of the others'.
    """

    single: frozenset[str] = frozenset()
    unlearned: frozenset[str] = frozenset()
    repeated: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Plan:
    """The records in execution order, and sentences about what stays in floating point (``notices``).

    ``coverage`` is the share of the multiply-accumulates with weights that quantized layers do. ``weight_bits`` is the
    mean over the weights of all linear layers and convolutions, ``activation_bits`` that of their inputs over their
    multiply-accumulates; floating point counts with the bits of its type.
    """

    layers: tuple[LayerRecord, ...]
    notices: tuple[str, ...]
    special: Special
    coverage: float
    weight_bits: float
    activation_bits: float


def make_plan(model: nn.Module, config: Config, calls: Calls) -> Plan:
    """The layers to quantize, in execution order; ``calls`` may be on another device than the model.

    Raises :class:`ModelError` for a skip pattern that matches nothing, or when no layer is left.
    """
    calls = calls.to(next(model.parameters()).device)
    require_rows(model, calls)
    seen = trace(model, calls)
    _check_skip(config, seen)
    roles, units = find_roles(seen), find_units(model, seen.faithful, seen.called, seen.products)
    layers = [seen.layers[name] for name in seen.faithful if not _skipped(config, name, roles[name])]
    owners = [name for name in seen.products if name in units and not _skipped(config, name)]
    if not seen.layers:
        raise _no_layers(model, seen)
    if not layers:
        raise ModelError(
            "0 layers of the model match: nothing would be quantized; check the skip list and the layers kept float."
        )
    records = {layer.name: _layer_record(layer, config, roles[layer.name], units[layer.name]) for layer in layers}
    single = {units[layer.name] for layer in layers if layer.rows is None and records[layer.name].inputs}
    if config.layers.attention:
        products = [(owner, f"{owner}.{ATTRIBUTE}.{i}") for owner in owners for i in range(seen.products[owner])]
        records |= {name: _product_record(name, config, units[owner]) for owner, name in products}
        single |= {units[owner] for owner in owners if owner in seen.mixed}
    unlearned = config.layers.unlearned_layers
    learned = {r.unit for name, r in records.items() if roles.get(name, set()).isdisjoint(unlearned)}
    repeated = dict.fromkeys(r.unit for r in records.values() if seen.called[r.unit] > 1)
    return Plan(
        _in_order(records.values()),
        tuple(_notices(seen, units, repeated, config)),
        Special(frozenset(single), frozenset(r.unit for r in records.values()) - learned, frozenset(repeated)),
        sum(layer.macs for layer in layers) / seen.macs,
        *_mean_bits(seen, records),
    )


def _no_layers(model: nn.Module, seen: Trace) -> ModelError:
    """What is said of a model whose calls pass none of its layers."""
    replaced = next((m for m in model.modules() if isinstance(vars(m).get("forward"), FunctionType)), None)
    if replaced is None:
        holders = dict.fromkeys(type(model.get_submodule(name)).__name__ for name in seen.loose)
        return ModelError(
            "The recorded calls reach no layer that can be quantized: these are torch's own linear layers and "
            "convolutions, and classes derived from them."
            + (
                f" The weights here are held by {_some(holders)}: compute what each makes of its weight once, and give "
                "it to an nn.Conv2d or nn.Linear in its place."
                if holders
                else ""
            )
        )
    return ModelError(
        f"The forward of {type(replaced).__name__} was replaced by a function, which calls the layers of the model "
        "itself where its quantized copy runs; define it in the class."
    )


def _mean_bits(seen: Trace, records: Mapping[str, LayerRecord]) -> tuple[float, float]:
    weights = activations = values = macs = 0.0
    for name, layer in seen.all_layers.items():
        weight = own_weight(layer.module)
        whole, record = 8 * weight.element_size(), records.get(name)
        of_weight = whole if record is None or record.weight_bits is None else record.weight_bits
        of_input = whole if record is None or not record.inputs else record.inputs[0].bits
        weights, values = weights + of_weight * weight.numel(), values + weight.numel()
        activations, macs = activations + of_input * layer.macs, macs + layer.macs
    return weights / values, activations / max(macs, 1)


def _check_skip(config: Config, seen: Trace) -> None:
    for pattern in config.layers.skip:
        if not any(fnmatchcase(name, pattern) for name in (*seen.all_layers, *seen.products)):
            raise ModelError(f"The skip pattern {pattern!r} matches no layer; `ptq-tdq inspect` lists the names.")


def find_roles(seen: Trace) -> dict[str, set[Role]]:
    """The roles of each layer, from what its input depends on and from its place."""
    roles: dict[str, set[Role]] = {name: set() for name in seen.layers}
    on_x = [layer for layer in seen.layers.values() if "x" in layer.sources]
    for layer in seen.layers.values():
        if layer.sources <= {"t"}:  # frame numbers are the same at each t
            roles[layer.name].add("time_embedding")
        elif layer.sources == {"t", "condition"}:
            roles[layer.name].add("modulation")
        if layer.name.rpartition(".")[2] == SHORTCUT:
            roles[layer.name].add("shortcut")
        elif layer in on_x[1:] and max(getattr(layer.module, "stride", (1,))) > 1:
            roles[layer.name].add("downsample")
    timed = next((name for name, own in roles.items() if "time_embedding" in own), None)
    if timed:
        roles[timed].add("first_time_embedding")
    if on_x:
        roles[on_x[0].name].add("first")
        roles[on_x[-1].name].add("last")
    return roles


def _skipped(config: Config, name: str, roles: Set[Role] = frozenset()) -> bool:
    choices = config.layers
    return not roles.isdisjoint(choices.float_layers) or any(fnmatchcase(name, pattern) for pattern in choices.skip)


def _layer_record(layer: TracedLayer, config: Config, roles: set[Role], unit: str) -> LayerRecord:
    scheme, choices = config.parsed_scheme, config.layers
    weight_only = not roles.isdisjoint(choices.weight_only_layers)
    float_input = weight_only or not roles.isdisjoint(choices.float_input_layers)
    eight = weight_only or not roles.isdisjoint(choices.eight_bit_layers)
    fixed = not roles.isdisjoint(config.activations.fixed_layers)
    split = choices.split_shortcuts and len(layer.parts) > 1 and not float_input
    names = [f"{layer.name}.{i}" for i in range(len(layer.parts))] if split else [layer.name]
    inputs = tuple(
        QuantizerRecord(
            name,
            8 if eight else scheme.activation_bits,
            "fixed" if fixed else config.method,
            "minmax" if fixed else config.activations.activation_range,
        )
        for name in names
        if not float_input
    )
    splits = (0, *accumulate(layer.parts)) if split else (0, layer.width)
    kind = layer_kind(layer.module)
    assert kind is not None
    dtype = dtype_name(own_weight(layer.module).dtype)
    rotated = config.weights.rotate == "hadamard" and kind == "linear" and len(inputs) == 1
    return LayerRecord(layer.name, kind, unit, splits, 8 if eight else scheme.weight_bits, inputs, dtype, rotated)


def _product_record(name: str, config: Config, unit: str) -> LayerRecord:
    bits, choices = config.parsed_scheme.activation_bits, config.activations
    inputs = tuple(
        QuantizerRecord(f"{name}.{o}", choices.softmax_bits, config.method, choices.activation_range, True)
        if o == "softmax"
        else QuantizerRecord(f"{name}.{o}", bits, config.method, choices.activation_range)
        for o in OPERANDS
    )
    return LayerRecord(name, "product", unit, (), None, inputs)


def _in_order(records: Collection[LayerRecord]) -> tuple[LayerRecord, ...]:
    """Execution order of the layers, each product behind the layers of its unit."""
    first: dict[str, int] = {}
    for place, record in enumerate(records):
        first.setdefault(record.unit, place)
    return tuple(sorted(records, key=lambda r: first[r.unit]))


def _notices(seen: Trace, units: dict[str, str], repeated: Collection[str], config: Config) -> Iterator[str]:
    """What stays in floating point, and why: each reason with the names that it is true of. And what t is read for."""
    unfaithful = [name for name, layer in seen.layers.items() if not layer.faithful]
    if unfaithful:
        yield (
            f"In floating point: {_some(unfaithful)}, since each is not the plain operation of its class on one input "
            "and its own weight (a forward pass of its own, a hook, further arguments, complex or empty weights)."
        )
    unbatched = [name for name, layer in seen.layers.items() if layer.faithful and layer.unbatched]
    if unbatched:
        yield f"In floating point: {_some(unbatched)}, since what each is given has no axis of samples."
    if seen.elsewhere:
        share = _share({name: layer.macs for name, layer in seen.elsewhere.items()}, seen)
        yield f"In floating point: {_some(seen.elsewhere)} ({share}), since only some calls reach them."
    if seen.unused:
        yield f"In floating point: {_some(seen.unused)}, since no call of any recorded form reaches them."
    if seen.loose:
        yield (
            f"Weights that no linear layer or convolution holds stay in floating point ({_share(seen.loose, seen)}): "
            f"those of {_some(seen.loose)}."
        )
    if seen.fused:
        yield (
            "Attention that torch computes in one piece (nn.MultiheadAttention), with the layers in it, stays in "
            f"floating point ({_share(seen.fused, seen)}): that of {_some(seen.fused)}."
        )
    if repeated:
        yield f"Quantized, but not learned, since they run several times in a call: {_some(list(repeated))}."
    if seen.shared_time:
        yield (
            "What the model predicts for a sample changes with the time step of another one in its batch, as where "
            "code reads t[0] for all; batches mix steps here, so read t of each sample, or expect worse samples."
        )
    if not config.layers.attention:
        return
    lost = [name for name in seen.products if name not in units]
    if lost:
        yield f"Attention products in floating point: those of {_some(lost)}, which hold units of their own."
    if seen.matmuls:
        yield (
            "Products of activations that are no scaled_dot_product_attention stay in floating point: those of "
            f"{_some(seen.matmuls)}."
        )
    if not (seen.products or seen.matmuls or seen.fused):
        yield "No attention products were found."


def _share(macs: Mapping[str, int], seen: Trace) -> str:
    return f"{sum(macs.values()) / seen.macs:.1%} of the multiply-accumulates"


def _some(names: Iterable[str]) -> str:
    shown = [name or "the model itself" for name in names]
    return ", ".join(shown[:NAMED]) + (f" and {len(shown) - NAMED} more" if len(shown) > NAMED else "")
