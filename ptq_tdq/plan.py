"""What to quantize: what was seen of the model's calls, and the choices of the config, give the records of all layers.

Nothing depends on a model family: order, roles, concatenations and attention products are observed, units come from the
model's own structure. One name is looked up: a shortcut is a layer called ``conv_shortcut``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import accumulate

from torch import nn

from ptq_tdq.calls import Calls
from ptq_tdq.config import Config, Role
from ptq_tdq.errors import ModelError
from ptq_tdq.modules import layer_kind
from ptq_tdq.modules.layers import own_weight
from ptq_tdq.modules.products import ATTRIBUTE, OPERANDS
from ptq_tdq.records import LayerRecord, QuantizerRecord
from ptq_tdq.trace import Trace, TracedLayer, require_rows, trace
from ptq_tdq.units import find_units

SHORTCUT = "conv_shortcut"


@dataclass(frozen=True)
class Plan:
    """The records in execution order, and sentences about what stays in floating point (``notices``).

    ``single`` names the units with quantizers whose rows cannot be told apart by sample (experts, sequences first):
    they run with one time step at a time; ``unlearned`` those that are quantized and not reconstructed. ``coverage`` is
    the share of the multiply-accumulates of convolutions and linear layers whose layer is quantized.
    """

    layers: tuple[LayerRecord, ...]
    notices: tuple[str, ...]
    single: frozenset[str]
    unlearned: frozenset[str]
    coverage: float


def make_plan(model: nn.Module, config: Config, calls: Calls) -> Plan:
    """The layers to quantize, in execution order.

    Raises :class:`ModelError` for a skip pattern that matches nothing, or when no layer is left.
    """
    require_rows(model, calls)
    seen = trace(model, calls)
    roles = find_roles(seen)
    refused = {layer.name: reason for layer in seen.layers.values() if (reason := _refusal(layer))}
    layers = [layer for name, layer in seen.layers.items() if name not in refused]
    owners = [name for name in seen.products if name]
    units = find_units(model, (layer.name for layer in layers), owners)
    # a product listens inside its module's forward pass, which a unit must not interrupt
    owners = [name for name in owners if not any(units[layer.name].startswith(f"{name}.") for layer in layers)]
    for pattern in config.skip:
        if not any(fnmatchcase(name, pattern) for name in (*seen.layers, *seen.products)):
            raise ModelError(f"The skip pattern {pattern!r} matches no layer; `ptq-tdq inspect` lists the names.")
    kept = [layer for layer in layers if not _skipped(config, layer.name, roles[layer.name])]
    records = {layer.name: _layer_record(layer, config, roles[layer.name], units[layer.name]) for layer in kept}
    if not records:
        raise ModelError(
            "0 layers of the model match: nothing would be quantized; check the skip list and the layers kept float."
        )
    if config.attention:
        for owner in owners:
            if not _skipped(config, owner, set()):
                for index in range(seen.products[owner]):
                    name = f"{owner}.{ATTRIBUTE}.{index}"
                    records[name] = _product_record(name, config, units[owner])
    total = sum(layer.macs for layer in seen.layers.values())
    quantized = sum(layer.macs for layer in kept)
    notices = tuple(_notices(seen, refused, owners, config))
    single = {units[layer.name] for layer in kept if layer.rows is None and records[layer.name].inputs}
    single |= {units[owner] for owner in seen.mixed if owner in units}
    learned = {r.unit for r in records.values() if not roles.get(r.name, set()) & set(config.unlearned_layers)}
    unlearned = {r.unit for r in records.values()} - learned
    coverage = quantized / total if total else 0.0
    return Plan(_in_order(records.values(), units), notices, frozenset(single), frozenset(unlearned), coverage)


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


def _refusal(layer: TracedLayer) -> str | None:
    """Why a layer cannot be quantized, or None."""
    return None if layer.faithful else "computes its weight in its own forward pass"


def _skipped(config: Config, name: str, roles: set[Role]) -> bool:
    return bool(roles & set(config.float_layers)) or any(fnmatchcase(name, pattern) for pattern in config.skip)


def _layer_record(layer: TracedLayer, config: Config, roles: set[Role], unit: str) -> LayerRecord:
    scheme = config.parsed_scheme
    weight_only = bool(roles & set(config.weight_only_layers))
    float_input = weight_only or bool(roles & set(config.float_input_layers))
    eight = weight_only or bool(roles & set(config.eight_bit_layers))
    fixed = bool(roles & set(config.fixed_layers))
    split = config.split_shortcuts and len(layer.parts) > 1 and not float_input
    names = [f"{layer.name}.{i}" for i in range(len(layer.parts))] if split else [layer.name]
    inputs = tuple(
        QuantizerRecord(
            name,
            8 if eight else scheme.activation_bits,
            "fixed" if fixed else config.method,
            "minmax" if fixed else config.activation_range,
        )
        for name in names
        if not float_input
    )
    splits = (0, *accumulate(layer.parts)) if split else (0, layer.width)
    kind = layer_kind(layer.module)
    assert kind is not None
    dtype = str(own_weight(layer.module).dtype).removeprefix("torch.")
    return LayerRecord(layer.name, kind, unit, splits, 8 if eight else scheme.weight_bits, inputs, dtype)


def _product_record(name: str, config: Config, unit: str) -> LayerRecord:
    bits = config.parsed_scheme.activation_bits
    inputs = tuple(
        QuantizerRecord(f"{name}.{o}", config.softmax_bits, config.method, config.activation_range, True)
        if o == "softmax"
        else QuantizerRecord(f"{name}.{o}", bits, config.method, config.activation_range)
        for o in OPERANDS
    )
    return LayerRecord(name, "product", unit, (), None, inputs)


def _in_order(records: Iterable[LayerRecord], units: dict[str, str]) -> tuple[LayerRecord, ...]:
    """Execution order of the layers, each product behind the layers of its unit."""
    records = list(records)
    first: dict[str, int] = {}
    for place, record in enumerate(records):
        first.setdefault(record.unit, place)
    return tuple(sorted(records, key=lambda r: first[r.unit]))


def _notices(seen: Trace, refused: dict[str, str], owners: list[str], config: Config) -> Iterable[str]:
    for reason in dict.fromkeys(refused.values()):
        names = [name for name, why in refused.items() if why == reason]
        yield f"In floating point: {_some(names)}, since each {reason}."
    if seen.unused:
        yield f"In floating point: {_some(seen.unused)}, since the recorded calls never reach them."
    if seen.loose:
        share = sum(seen.loose.values()) / (sum(seen.loose.values()) + sum(x.macs for x in seen.layers.values()))
        yield (
            f"Weights that no linear layer or convolution holds stay in floating point ({share:.1%} of the "
            f"multiply-accumulates): those of {_some([name or 'the model itself' for name in seen.loose])}."
        )
    if not config.attention:
        return
    lost = [name or "the model itself" for name in seen.products if name not in owners]
    if lost:
        yield f"Attention products in floating point: those of {_some(lost)}, which hold units of their own."
    if seen.matmuls:
        yield (
            f"Products of activations that are no scaled_dot_product_attention stay in floating point: those of "
            f"{_some(list(seen.matmuls))}."
        )
    if not seen.products and not seen.matmuls:
        yield "No attention products were found."


def _some(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
