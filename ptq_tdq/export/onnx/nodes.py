"""A small builder: nodes, constants and initializers of an ONNX graph, named after the layer that they belong to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

Operand = ir.Value | NDArray[Any] | np.generic | None


class Builder:
    """Collects new nodes until :meth:`flush` puts them into the graph.

    Call it with an operator and its operands; arrays become constants that equal ones share, None is an operand left
    out. ``prefix`` starts the names of what is built next.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.prefix = ""
        self._nodes: list[ir.Node] = []
        self._names = Counter(str(value.name) for value in (*graph.inputs, *graph.outputs))  # and of nodes,
        self._replaced = self._names.copy()  # and of what took a node's place: a layer may run twice in a call
        self._constants: dict[tuple[Any, ...], ir.Value] = {}

    def __call__(self, op: str, *operands: Operand, name: str | None = None, **attributes: Any) -> ir.Value:
        """One node with one output; ``name`` names node and output, otherwise they are numbered."""
        return self.many(op, *operands, count=1, name=name, **attributes)[0]

    def many(
        self, op: str, *operands: Operand, count: int, name: str | None = None, **attributes: Any
    ) -> tuple[ir.Value, ...]:
        """One node with ``count`` outputs."""
        name = _numbered(self._names, name or (f"{self.prefix}/{op}" if self.prefix else op))
        inputs = [self.constant(o) if isinstance(o, np.ndarray | np.generic) else o for o in operands]
        while inputs and inputs[-1] is None:  # OpenVINO takes no absent bias of a ConvTranspose
            inputs.pop()
        names = [name] if count == 1 else [f"{name}:{i}" for i in range(count)]
        outputs = [ir.Value(name=n) for n in names]
        self._nodes.append(ir.node(op, inputs, attributes or None, outputs=outputs, name=name))
        return tuple(outputs)

    def initializer(self, name: str, array: NDArray[Any]) -> ir.Value:
        """A named array, stored in the file; a layer that runs twice in a call asks for its own again."""
        if name in self.graph.initializers:
            return self.graph.initializers[name]
        tensor = ir.tensor(np.array(array, order="C"), name=name)
        value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def constant(self, array: NDArray[Any] | np.generic) -> ir.Value:
        """A small array that all nodes with the same value share."""
        array = np.asarray(array)
        key = (array.dtype.name, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self.initializer(f"constant.{len(self._constants)}", array)
        return self._constants[key]

    def total(self, terms: Iterable[ir.Value]) -> ir.Value:
        """The sum of one or more values."""
        first, *rest = terms
        for term in rest:
            first = self("Add", first, term)
        return first

    def flush(self, before: ir.Node) -> None:
        """Put what was built in front of ``before``."""
        self.graph.insert_before(before, self._nodes)
        self._nodes = []

    def replace(self, node: ir.Node, value: ir.Value, name: str) -> None:
        """Put what was built in the place of ``node``, whose only output becomes ``value`` under the given name."""
        self.flush(node)
        old = node.outputs[0]
        value.shape, value.type = old.shape, old.type
        value.name = old.name if old.is_graph_output() else _numbered(self._replaced, name)
        ir.convenience.replace_all_uses_with(old, value, replace_graph_outputs=True)
        self.graph.remove(node, safe=True)


def _numbered(known: Counter[str], stem: str) -> str:
    known[stem] += 1
    return stem if known[stem] == 1 else f"{stem}_{known[stem] - 1}"


def axes(*values: int) -> NDArray[np.int64]:
    """Axes, shapes and other int64 vectors of ONNX operators."""
    return np.array(values, dtype=np.int64)
