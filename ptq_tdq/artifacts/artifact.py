"""The artifact as plain data, and the facts that hold for every one of them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ptq_tdq.artifacts.document import metrics_problem
from ptq_tdq.errors import ArtifactCorruptError, ArtifactMismatchError
from ptq_tdq.records import LayerRecord, QuantizerRecord
from ptq_tdq.scheme import QType
from ptq_tdq.timeaxis import TimeAxis

DYNAMIC = "dynamic"  # such a method finds scales at run time; others whose names begin so have a network or a table
TOKEN = "dynamic-token"  # without either
LARGEST_EXPONENT = 20  # of the factors of an equalized layer
DERIVED_KEYS = frozenset(
    {"schema_version", "layers", "files", "config_sha256"}
)  # of the config; made when it is written
_WEIGHT_DIMS = {"linear": 2} | {f"conv{form}{n}d": 2 + n for form in ("", "_transpose") for n in (1, 2, 3)}


@dataclass(frozen=True, eq=False)
class IntervalTable:
    """Interval and zero point of one quantizer at every time step t.

    ``scale`` float32 [T + 1], ``zero_point`` int32 [T + 1], for t = 0 to T. A dynamic quantizer finds its scale at run
    time: ``scale`` is None and ``zero_point`` is [1]; ``generator`` holds the tensors of its network, or the table of
    the ratios of tokens' intervals, if it has one.
    """

    scale: Tensor | None
    zero_point: Tensor
    generator: dict[str, Tensor] = field(default_factory=dict)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """All of it by the keys that a file has for the quantizer ``name``."""
        found = {f"{name}.zero_point": self.zero_point}
        if self.scale is not None:
            found[f"{name}.scale"] = self.scale
        return found | {f"{name}.generator.{key}": tensor for key, tensor in self.generator.items()}

    @classmethod
    def take(cls, name: str, tensors: dict[str, Tensor]) -> IntervalTable:
        """Inverse of :meth:`tensors`; what it takes leaves ``tensors``."""
        prefix = f"{name}.generator."
        generator = {key.removeprefix(prefix): tensors.pop(key) for key in list(tensors) if key.startswith(prefix)}
        return cls(tensors.pop(f"{name}.scale", None), tensors.pop(f"{name}.zero_point"), generator)


@dataclass(frozen=True, eq=False)
class Artifact:
    """A quantized model as plain data; ARCHITECTURE.md describes the directory that holds it.

    ``config`` is ptq_tdq_config.json without :data:`DERIVED_KEYS`. ``tables`` has one entry per quantizer, by its name.
    The three weight dictionaries are keyed by layer: ``weight_codes`` uint8 in the weight's shape [O, ...],
    ``weight_scale`` float32 and ``weight_zero_point`` int32 [O, P] ([1, P] per tensor), P = number of channel ranges.
    ``divisors`` float32 [C] are powers of two by which the input channels of an equalized layer are divided.
    ``float_state`` holds every other tensor of the model's state dict. ``card`` is the text of README.md.
    """

    config: dict[str, Any]
    layers: tuple[LayerRecord, ...]
    tables: dict[str, IntervalTable]
    weight_codes: dict[str, Tensor]
    weight_scale: dict[str, Tensor]
    weight_zero_point: dict[str, Tensor]
    float_state: dict[str, Tensor]
    metrics: dict[str, Any]
    card: str
    divisors: dict[str, Tensor] = field(default_factory=dict)

    @property
    def time_axis(self) -> TimeAxis:
        """How the model's time argument becomes t, the key of each table."""
        return TimeAxis.from_dict(self.config["time_axis"])

    @property
    def num_train_timesteps(self) -> int:
        """T: each table covers t = 0 to T."""
        return self.time_axis.num_train_timesteps

    @property
    def quantizers(self) -> tuple[QuantizerRecord, ...]:
        """The activation quantizers of all layers in execution order."""
        return tuple(quantizer for layer in self.layers for quantizer in layer.inputs)

    @property
    def networks(self) -> list[str]:
        """The quantizers that ask a network for their interval at run time."""
        return [q.name for q in self.quantizers if self.tables[q.name].generator and not q.method.startswith(TOKEN)]

    @property
    def by_token(self) -> list[str]:
        """The quantizers that find an interval for each token at run time."""
        return [q.name for q in self.quantizers if q.method.startswith(TOKEN)]


def check_base_model(artifact: Artifact, sha256: str) -> None:
    """Raise :class:`ArtifactMismatchError` unless the weights with hash ``sha256`` are those that were quantized."""
    base = artifact.config["base_model"]
    if base["sha256"] != sha256:
        raise ArtifactMismatchError(
            f"The artifact was made from '{base['id']}' with weights {base['sha256']}. "
            f"Got a model with weights {sha256} instead; load the artifact with the model that it was made from."
        )


def check_artifact(artifact: Artifact) -> None:
    """Raise :class:`ArtifactCorruptError` with the first contradiction between layers, tables and tensors."""
    length = _table_length(artifact)
    problem = metrics_problem(artifact.metrics)
    _require(problem is None, f"The metrics are not valid at {problem}")
    for name, count in Counter([layer.name for layer in artifact.layers]).items():
        _require(count == 1, f"The layer '{name}' is listed {count} times")
    for name, count in Counter([quantizer.name for quantizer in artifact.quantizers]).items():
        _require(count == 1, f"The quantizer '{name}' is listed {count} times")
    _same_names("interval table", artifact.tables, {quantizer.name for quantizer in artifact.quantizers})
    weighted = [layer for layer in artifact.layers if layer.weight_bits is not None]
    for part in (artifact.weight_codes, artifact.weight_scale, artifact.weight_zero_point):
        _same_names("quantized weight", part, {layer.name for layer in weighted})
    for quantizer in artifact.quantizers:
        _check_table(quantizer, artifact.tables[quantizer.name], length)
    for layer in weighted:
        name = layer.name
        _check_weight(layer, artifact.weight_codes[name], artifact.weight_scale[name], artifact.weight_zero_point[name])
    for layer in artifact.layers:
        whole = layer.kind == "linear" and len(layer.inputs) == 1
        _require(whole or not layer.rotated, f"'{layer.name}' is rotated and no linear layer with a quantized input")
    kinds = {layer.name: layer.kind for layer in weighted if len(layer.inputs) == 1}
    for name, divisor in artifact.divisors.items():
        what = f"The divisor of '{name}'"
        _require(kinds.get(name) == "linear", f"{what} belongs to no linear layer with a quantized input")
        _check_form(what, "factors", divisor, torch.float32, (artifact.weight_codes[name].shape[1],))
        mantissa, exponent = torch.frexp(divisor)
        powers = (mantissa == 0.5) & (exponent.abs() <= LARGEST_EXPONENT)
        _require(bool(powers.all()), f"{what} has factors that are no powers of two near 1")
    for name, tensor in artifact.float_state.items():
        _require(_is_finite(tensor), f"The tensor '{name}' has NaN or Inf")


def _table_length(artifact: Artifact) -> int:
    try:
        return artifact.time_axis.length
    except (TypeError, ValueError) as error:
        raise ArtifactCorruptError(f"The artifact's time axis is none ({error}); make the artifact again.") from None


def _check_table(quantizer: QuantizerRecord, table: IntervalTable, steps: int) -> None:
    what = f"The interval table of '{quantizer.name}'"
    dynamic, network = quantizer.method.startswith(DYNAMIC), quantizer.method not in (DYNAMIC, TOKEN)
    fits = (table.scale is None) == dynamic and bool(table.generator) == (dynamic and network)
    _require(fits, f"{what} does not fit method '{quantizer.method}'")
    _require(all(map(_is_finite, table.generator.values())), f"{what} has NaN or Inf")
    shape = (1,) if table.scale is None else (steps,)
    if table.scale is not None:
        _check_scale(what, table.scale, shape, quantizer.bits)
    _check_zero_point(what, table.zero_point, shape, quantizer.bits)


def _check_weight(layer: LayerRecord, codes: Tensor, scale: Tensor, zero_point: Tensor) -> None:
    what, bits, ranges = f"The weight of '{layer.name}'", layer.weight_bits or 0, len(layer.ranges)
    _require(codes.dtype == torch.uint8, f"{what} has {codes.dtype} codes, not uint8")
    _require(
        codes.ndim == _WEIGHT_DIMS.get(layer.kind) and codes.numel() > 0,
        f"{what} has the shape {list(codes.shape)}, which no {layer.kind} has",
    )
    _require(int(codes.max()) <= QType(bits).qmax, f"{what} has codes above {QType(bits).qmax} at {bits} bits")
    increasing = all(low < high for low, high in layer.ranges)
    _require(ranges >= 1 and layer.splits[0] == 0 and increasing, f"{what} has the channel ranges {layer.splits}")
    _require(ranges == 1 or layer.splits[-1] == codes.shape[1], f"{what} does not have {layer.splits[-1]} channels")
    shape = (1 if scale.shape[:1] == (1,) else codes.shape[0], ranges)
    _check_scale(what, scale, shape, bits)
    _check_zero_point(what, zero_point, shape, bits)


def _check_scale(what: str, scale: Tensor, shape: tuple[int, ...], bits: int) -> None:
    _check_form(what, "scales", scale, torch.float32, shape)
    # The whole range must be finite, or dequantizing gives Inf.
    valid = (scale > 0) & (scale * QType(bits).qmax).isfinite()
    _require(bool(valid.all()), f"{what} has a scale that is NaN, not positive or too large")


def _check_zero_point(what: str, zero_point: Tensor, shape: tuple[int, ...], bits: int) -> None:
    _check_form(what, "zero points", zero_point, torch.int32, shape)
    inside = (zero_point >= 0) & (zero_point <= QType(bits).qmax)
    _require(bool(inside.all()), f"{what} has a zero point outside 0 to {QType(bits).qmax}")


def _check_form(what: str, part: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    found = f"{tensor.dtype} {list(tensor.shape)}"
    _require(tensor.dtype == dtype and tensor.shape == shape, f"{what} needs {part} {dtype} {list(shape)}, not {found}")


def _is_finite(tensor: Tensor) -> bool:
    # in float64, because torch has no such test for the 8-bit floats
    return not tensor.is_floating_point() or bool(tensor.cpu().double().isfinite().all())


def _same_names(what: str, found: dict[str, Any], expected: set[str]) -> None:
    for name in sorted(expected - set(found)):
        raise ArtifactCorruptError(f"The {what} of '{name}' is missing; make the artifact again.")
    for name in sorted(set(found) - expected):
        raise ArtifactCorruptError(f"The {what} of '{name}' belongs to no layer; make the artifact again.")


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise ArtifactCorruptError(f"{sentence}; make the artifact again.")
