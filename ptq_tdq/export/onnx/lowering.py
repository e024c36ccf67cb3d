"""From the skeleton to a graph of standard operators: each opaque node becomes what a form makes of it."""

from __future__ import annotations

import onnx_ir as ir

from ptq_tdq.artifacts import Artifact
from ptq_tdq.export.onnx.floating import ANNOTATION
from ptq_tdq.export.onnx.lookup import Lookup
from ptq_tdq.export.onnx.nodes import Builder
from ptq_tdq.export.onnx.portable import Portable
from ptq_tdq.export.onnx.skeleton import BATCH, DOMAIN, Skeleton


def lower(skeleton: Skeleton, artifact: Artifact, form: type[Portable]) -> ir.Model:
    """A copy of the skeleton without opaque nodes."""
    model = skeleton.model.clone()
    graph = model.graph
    b, first = Builder(graph), graph[0]
    time = next(value for value in graph.inputs if value.name == skeleton.signature.time)
    lowering = form(b, Lookup(b, artifact, time, skeleton.symbol(BATCH)), artifact)
    b.flush(first)
    _lower_products(graph, b, lowering, artifact)
    _lower_layers(graph, b, lowering, artifact, skeleton)
    for node in [n for n in graph if n.op_type == "GroupNormalization"]:
        b.prefix = str(node.name)
        if (value := lowering.group_norm(node)) is not None:
            b.replace(node, value, b.prefix)
    _remove_unused(graph)
    graph.sort()  # what several layers share was built where the first of them was lowered
    graph.opset_imports.pop(DOMAIN, None)
    _name_sizes(graph, skeleton)
    return model


def _lower_products(graph: ir.Graph, b: Builder, lowering: Portable, artifact: Artifact) -> None:
    """Products of two quantized operands, taken together with their quantizers."""
    quantizers = {quantizer.name: quantizer for quantizer in artifact.quantizers}
    for node in [n for n in graph if n.op_type == "MatMul"]:
        operands = [_operand(value) for value in node.inputs]
        if None in operands:
            continue
        (left, x, turned, rank), (right, y, transposed, _) = (o for o in operands if o is not None)
        if turned:
            continue
        b.prefix = left.rpartition(".")[0]
        product = lowering.product(quantizers[left], x, quantizers[right], y, transposed, rank)
        b.replace(node, product, f"{left}*{right.rpartition('.')[2]}")


def _lower_layers(graph: ir.Graph, b: Builder, lowering: Portable, artifact: Artifact, skeleton: Skeleton) -> None:
    """Layers with their quantizers, and the quantizers that went into no product."""
    records = {record.name: record for record in artifact.layers}
    quantizers = {quantizer.name: quantizer for quantizer in artifact.quantizers}
    for node in [n for n in graph if n.domain == DOMAIN]:
        if _unused(node):  # a quantizer that went into a product
            continue
        name, source = node.attributes["name"].as_string(), node.inputs[0]
        rank = _rank(node.outputs[0])
        assert source is not None
        b.prefix = name
        if node.op_type == "Layer":
            b.replace(node, lowering.layer(records[name], skeleton.layers[name], source, rank), name)
        else:
            b.replace(node, lowering.quantizer(quantizers[name], source, rank), name)


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


def _operand(value: ir.Value | None) -> tuple[str, ir.Value, bool, int] | None:
    """``(quantizer, its input, transposed, rank)`` where ``value`` is a quantizer's output or the transpose of one."""
    node = None if value is None else value.producer()
    transposed = node is not None and node.op_type == "Transpose"
    if node is not None and transposed:
        source, order = node.inputs[0], list(node.attributes["perm"].as_ints())
        if source is None or order != [*range(len(order) - 2), len(order) - 1, len(order) - 2]:
            return None
        node = source.producer()
    if node is None or node.domain != DOMAIN or node.op_type != "Quantizer":
        return None
    x = node.inputs[0]
    assert x is not None
    return node.attributes["name"].as_string(), x, transposed, _rank(node.outputs[0])


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
