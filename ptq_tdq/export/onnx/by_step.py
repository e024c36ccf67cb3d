"""A static graph for each time step, as hardware toolchains take it: Q and DQ with constant parameters.

At one t every interval is a pair of numbers, so each graph is what static quantization writes (QuantizeLinear and
DequantizeLinear): activations in 8 bits with one scale and zero point, weights as INT8 with a scale for each output
channel (narrower codes in the same types), both sides of a product behind DequantizeLinear. Steps whose intervals are
all equal share a graph: a static artifact has one. All graphs read their weights from one file beside them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ptq_tdq.artifacts import Artifact
from ptq_tdq.artifacts.artifact import IntervalTable
from ptq_tdq.errors import ModelError
from ptq_tdq.export.onnx.floating import Paired
from ptq_tdq.export.onnx.geometry import is_linear
from ptq_tdq.export.onnx.lookup import Lookup
from ptq_tdq.export.onnx.nodes import Builder
from ptq_tdq.export.onnx.outputs import Outputs
from ptq_tdq.export.onnx.portable import by_instances
from ptq_tdq.export.onnx.runtimes import WEIGHTS
from ptq_tdq.export.onnx.weights import RangeWeight, as_columns, range_weights
from ptq_tdq.records import LayerRecord, QuantizerRecord
from ptq_tdq.timeaxis import lookup

SHARED = 1 << 10  # bytes of an array that goes to the common file


class Static(Paired):
    """Lowers to Q/DQ pairs; every interval is known.

    ``outputs`` are the intervals of what convolutions give, one for each channel range of a layer; the others' outputs
    stay in floating point.
    """

    divides = False

    def __init__(self, b: Builder, lookup: Lookup, artifact: Artifact, outputs: Outputs | None = None) -> None:
        super().__init__(b, lookup, artifact)
        self.outputs = outputs or {}

    def layer(self, record: LayerRecord, module: nn.Module, x: ir.Value, rank: int) -> ir.Value:
        weights = range_weights(self.artifact, record)
        if record.name not in self.outputs or any(weight.rest is not None for weight in weights):
            return super().layer(record, module, x, rank)
        b, bias, inputs, terms = self.b, self.bias(record), self.split(record, x, rank), list[ir.Value]()
        for q, part, weight, interval in zip(record.inputs, inputs, weights, self.outputs[record.name], strict=True):
            values, real = self.codes(q, part, rank).values, self.weight(module, weight)
            first = None if bias is None or terms else self.of_sums(bias, q, weight)  # the first range brings the bias
            codes = b("QuantizeLinear", self.operation(module, values, real, first), *interval)
            terms.append(b("DequantizeLinear", codes, *interval))
        return b.total(terms)

    def of_sums(self, bias: NDArray[np.float32], q: QuantizerRecord, weight: RangeWeight) -> ir.Value:
        """The bias [O] as INT32 in the scale of the sums."""
        x_scale = self.lookup.intervals[q.name].scale
        assert x_scale is not None
        scale, most = x_scale * weight.scale, np.iinfo(np.int32)
        codes = np.rint(bias / scale.astype(np.float64)).clip(most.min, most.max)
        return self.b("DequantizeLinear", codes.astype(np.int32), scale, axis=0)

    def weight(self, module: nn.Module, weight: RangeWeight) -> ir.Value:
        b, linear = self.b, is_linear(module)
        rest = weight.rest  # without it codes less their zero points are INT8
        codes = weight.centred if rest is None else weight.codes.astype(np.int16) - 128
        stored = b.initializer(weight.name, (as_columns(codes) if linear else codes).astype(np.int8))
        scale = b.initializer(f"{weight.name}_scale", weight.scale)
        zero = None if rest is None else b.initializer(f"{weight.name}_zero_point", rest.astype(np.int8))
        return b("DequantizeLinear", stored, scale, zero, axis=1 if linear else 0)

    def group_norm(self, node: ir.Node) -> ir.Value | None:
        return by_instances(self.b, node)


def frozen(artifact: Artifact, t: float) -> Artifact:
    """The artifact with the intervals of ``t`` at every time step."""
    at = torch.tensor([t], dtype=torch.float64)

    def row(table: Tensor) -> Tensor:
        return lookup(table, at).to(table.dtype).expand(len(table))

    tables = {
        name: IntervalTable(row(table.scale), row(table.zero_point))
        for name, table in artifact.tables.items()
        if table.scale is not None
    }
    return replace(artifact, tables=tables)


def groups_of_steps(artifact: Artifact, steps: list[float]) -> list[list[float]]:
    """``steps`` in groups with equal intervals, in their order.

    Raises :class:`ModelError` for a quantizer whose interval is not a function of t alone.
    """
    for name, table in artifact.tables.items():
        if table.scale is None:
            raise ModelError(
                f"The quantizer '{name}' finds its interval in each tensor, which no static graph can hold; choose an "
                "artifact with another method."
            )
    found: dict[bytes, list[float]] = {}
    for t in steps:
        tables = frozen(artifact, t).tables.values()
        numbers = [
            v[:1].numpy().tobytes() for table in tables for v in (table.scale, table.zero_point) if v is not None
        ]
        found.setdefault(b"".join(numbers), []).append(t)
    return list(found.values())


class SharedWeights:
    """The file of arrays that all graphs read; equal ones are written once."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / WEIGHTS
        self._places: dict[bytes, int] = {}
        self._end = 0
        self.file.write_bytes(b"")

    def take(self, model: ir.Model) -> None:
        """Move the large initializers of ``model`` there."""
        with self.file.open("ab") as file:
            for value, data in _large(model.graph):
                key = hashlib.sha256(data).digest()
                if key not in self._places:
                    file.write(data)
                    self._places[key], self._end = self._end, self._end + len(data)
                tensor = value.const_value
                assert tensor is not None
                value.const_value = ir.ExternalTensor(
                    WEIGHTS,
                    self._places[key],
                    len(data),
                    tensor.dtype,
                    shape=ir.Shape(tensor.numpy().shape),
                    name=value.name or "",
                )


def _large(graph: ir.Graph) -> Iterator[tuple[ir.Value, bytes]]:
    for value in graph.initializers.values():
        if value.const_value is not None and value.const_value.nbytes >= SHARED:
            yield value, value.const_value.tobytes()
