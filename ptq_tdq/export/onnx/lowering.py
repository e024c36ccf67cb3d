"""From the skeleton to a graph of standard operators: each opaque node becomes what a form makes of it."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from ptq_tdq.artifacts import Artifact
from ptq_tdq.export.onnx.floating import ANNOTATION
from ptq_tdq.export.onnx.lookup import Lookup
from ptq_tdq.export.onnx.nodes import Builder, axes
from ptq_tdq.export.onnx.portable import Portable, swapped
from ptq_tdq.export.onnx.skeleton import Skeleton
from ptq_tdq.export.onnx.tracing import DOMAIN
from ptq_tdq.rotate import factors, signs

COLUMNS = 32  # of a rotation's right factor: what runtimes multiply small matrices with fastest


def lower(skeleton: Skeleton, artifact: Artifact, form: type[Portable], **choices: Any) -> ir.Model:
    """A copy of the skeleton without opaque nodes; ``choices`` are the form's own."""
    model = skeleton.model.clone()
    graph = model.graph
    b, first = Builder(graph), graph[0]
    time = next(value for value in graph.inputs if value.name == skeleton.signature.time)
    lowering = form(b, Lookup(b, artifact, time, skeleton.batch, of_one_step(artifact, form)), artifact, **choices)
    b.flush(first)
    _lower_nodes(graph, b, lowering, artifact, skeleton)
    for node in [n for n in graph if n.op_type == "GroupNormalization"]:
        b.prefix = str(node.name)
        if (value := lowering.group_norm(node)) is not None:
            b.replace(node, value, b.prefix)
    _remove_unused(graph)
    graph.sort()  # what several layers share was built where the first of them was lowered
    graph.opset_imports.pop(DOMAIN, None)
    _name_sizes(graph, skeleton)
    return model


def of_one_step(artifact: Artifact, form: type[Portable]) -> bool:
    """Whether a graph takes the same t for all samples of a call: rows of some models are of no one sample."""
    return form.one_step or bool(artifact.config.get("one_step"))


def _lower_nodes(graph: ir.Graph, b: Builder, lowering: Portable, artifact: Artifact, skeleton: Skeleton) -> None:
    """Layers with their quantizers, products of two quantized operands, and the quantizers that are in none.

    In the order of the graph, since what several of them share is made from the first one's input.
    """
    records = {record.name: record for record in artifact.layers}
    quantizers = {quantizer.name: quantizer for quantizer in artifact.quantizers}
    products = {node: found for node in graph if (found := _operands(node)) is not None}
    for node in list(graph):
        if node in products:
            left, right = products[node]
            b.prefix = left.name.rpartition(".")[0]
            pair = (quantizers[left.name], left.x, quantizers[right.name], right.x)
            product = lowering.product(*pair, right.transposed, _rank(left.x))
            b.replace(node, product, f"{left.name}*{right.name.rpartition('.')[2]}")
        elif node.domain == DOMAIN:
            b.prefix = name = node.attributes["name"].as_string()
            source, rank = node.inputs[0], _rank(node.outputs[0])
            assert source is not None
            if node.op_type == "Layer":
                if records[name].rotated:
                    source = _rotated(b, source, rank, records[name].splits[-1])
                divisor = artifact.divisors.get(name)
                source = source if divisor is None else b("Mul", source, divisor.reciprocal().numpy())
                b.replace(node, lowering.layer(records[name], skeleton.layers[name], source, rank), name)
            elif not all(_only_in(products, user) for user, _ in node.outputs[0].uses()):
                b.replace(node, lowering.quantizer(quantizers[name], source, rank), name)


def _rotated(b: Builder, x: ir.Value, rank: int, channels: int) -> ir.Value:
    """``x`` [..., C] of ``rank`` axes with its channels rotated; a 0 in a shape keeps the size."""
    (left, right), kept = factors(channels, COLUMNS), [0] * (rank - 1)
    y = b("Reshape", b("Mul", x, signs(channels).numpy()), axes(*kept, len(left), len(right)))
    y = b("MatMul", y, right.numpy())
    if len(left) > 1:
        y = b("MatMul", left.numpy(), y)
    return b("Reshape", y, axes(*kept, channels))


def _name_sizes(graph: ir.Graph, skeleton: Skeleton) -> None:
    """Say what is free in the inputs and outputs; the inner shapes follow from them and are left to the reader."""
    for node in graph:
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape = value.type = None
    for value in (*graph.inputs, *graph.outputs):
        if value.shape is not None:
            value.shape = ir.Shape([_size(dim, skeleton.sizes) for dim in value.shape])


def _size(dim: int | ir.SymbolicDim, sizes: dict[str, str | int]) -> int | str | None:
    text = str(dim)
    return int(text) if text.isdecimal() else sizes.get(text)


@dataclass(frozen=True)
class _Operand:
    """One side of a product: a quantizer, its input, and whether its output's last two axes are swapped."""

    name: str
    x: ir.Value
    transposed: bool


def _operands(node: ir.Node) -> tuple[_Operand, _Operand] | None:
    """Both sides of a MatMul of two quantizers' outputs, of which the right one may be transposed."""
    if node.op_type != "MatMul":
        return None
    left, right = map(_operand, node.inputs)
    return None if left is None or right is None or left.transposed else (left, right)


def _operand(value: ir.Value | None) -> _Operand | None:
    node = None if value is None else value.producer()
    transposed = node is not None and node.op_type == "Transpose"
    if node is not None and transposed:
        source, order = node.inputs[0], list(node.attributes["perm"].as_ints())
        if source is None or order != swapped(len(order)):
            return None
        node = source.producer()
    if node is None or node.domain != DOMAIN or node.op_type != "Quantizer":
        return None
    x = node.inputs[0]
    assert x is not None
    return _Operand(node.attributes["name"].as_string(), x, transposed)


def _only_in(products: Container[ir.Node], node: ir.Node) -> bool:
    """Whether ``node`` is one of the products, or a Transpose that only they read."""
    if node.op_type == "Transpose":
        return all(user in products for user, _ in node.outputs[0].uses())
    return node in products


def _rank(value: ir.Value) -> int:
    assert value.shape is not None
    return value.shape.rank()


def _remove_unused(graph: ir.Graph) -> None:
    """Drop nodes and initializers that nothing reads and no annotation names."""
    graph.sort()
    for node in reversed(list(graph)):
        if _unused(node):
            graph.remove(node, safe=True)
    named = {name for value in graph.initializers.values() for name in value.meta.get(ANNOTATION, {}).values()}
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output() and name not in named:
            del graph.initializers[name]


def _unused(node: ir.Node) -> bool:
    return not any(value.uses() or value.is_graph_output() for value in node.outputs)
