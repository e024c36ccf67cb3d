"""From the skeleton to a graph of standard operators: each opaque node becomes what a form makes of it."""

from __future__ import annotations

import onnx_ir as ir

from ptq_tdq.artifacts import Artifact
from ptq_tdq.export.onnx.floating import ANNOTATION
from ptq_tdq.export.onnx.lookup import Lookup
from ptq_tdq.export.onnx.nodes import Builder
from ptq_tdq.export.onnx.portable import Portable
from ptq_tdq.export.onnx.skeleton import DOMAIN, Skeleton

BATCH = "batch"


def lower(skeleton: Skeleton, artifact: Artifact, form: type[Portable]) -> ir.Model:
    """A copy of the skeleton without opaque nodes; ``timestep`` may now be [1] for the whole batch.

    Raises :class:`~ptq_tdq.errors.ModelError` for a layer that no form can express.
    """
    model = skeleton.model.clone()
    graph = model.graph
    b, first = Builder(graph), graph[0]
    sample, timestep = graph.inputs[:2]
    readers = list(timestep.uses())
    lookup = Lookup(b, artifact, sample, timestep)
    for node, index in readers:
        node.replace_input_with(index, lookup.t)
    lowering = form(b, lookup, artifact)
    b.flush(first)

    records = {record.name: record for record in artifact.layers}
    quantizers = {quantizer.name: quantizer for quantizer in artifact.quantizers}
    for node in [n for n in graph if n.op_type == "MatMul"]:
        operands = [_operand(value) for value in node.inputs]
        if None in operands:
            continue
        (left, x, _), (right, y, transposed) = (o for o in operands if o is not None)
        b.prefix = left.rpartition(".")[0]
        product = lowering.product(quantizers[left], x, quantizers[right], y, transposed)
        b.replace(node, product, f"{left}*{right.rpartition('.')[2]}")
    for node in [n for n in graph if n.domain == DOMAIN]:
        if _unused(node):  # a quantizer that went into a product
            continue
        name, source = node.attributes["name"].as_string(), node.inputs[0]
        rank = node.outputs[0].shape.rank() if node.outputs[0].shape is not None else 0
        assert source is not None
        b.prefix = name
        if node.op_type == "Layer":
            b.replace(node, lowering.layer(records[name], skeleton.layers[name], source, rank), name)
        else:
            b.replace(node, lowering.quantizer(quantizers[name], source, rank), name)
    for node in [n for n in graph if n.op_type == "GroupNormalization"]:
        b.prefix = str(node.name)
        if (value := lowering.group_norm(node)) is not None:
            b.replace(node, value, b.prefix)
    _remove_unused(graph)
    graph.opset_imports.pop(DOMAIN, None)
    _name_sizes(graph)
    return model


def _name_sizes(graph: ir.Graph) -> None:
    """Say what is free in the inputs; the inner values' shapes follow from them and are left to the reader."""
    for node in graph:
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape = value.type = None
    sample, timestep, *labels = graph.inputs
    for image in (sample, graph.outputs[0]):
        assert image.shape is not None
        image.shape = ir.Shape([BATCH, image.shape[1], "height", "width"])
    timestep.shape = ir.Shape([f"{BATCH} or 1"])
    for value in labels:
        value.shape = ir.Shape([BATCH])


def _operand(value: ir.Value | None) -> tuple[str, ir.Value, bool] | None:
    """``(quantizer, its input, transposed)`` where ``value`` is a quantizer's output or the transpose of one."""
    node = None if value is None else value.producer()
    transposed = node is not None and node.op_type == "Transpose"
    if node is not None and transposed:
        source = node.inputs[0]
        if list(node.attributes["perm"].as_ints()) != [0, 1, 3, 2] or source is None:
            return None
        node = source.producer()
    if node is None or node.domain != DOMAIN or node.op_type != "Quantizer":
        return None
    x = node.inputs[0]
    assert x is not None
    return node.attributes["name"].as_string(), x, transposed


def _remove_unused(graph: ir.Graph) -> None:
    """Drop nodes and initializers that nothing reads and no annotation names."""
    for node in reversed(list(graph)):
        if _unused(node):
            graph.remove(node, safe=True)
    named = {name for value in graph.initializers.values() for name in value.meta.get(ANNOTATION, {}).values()}
    for name, value in list(graph.initializers.items()):
        if not value.uses() and name not in named:
            del graph.initializers[name]


def _unused(node: ir.Node) -> bool:
    return not any(value.uses() or value.is_graph_output() for value in node.outputs)
