"""The skeleton: the model's graph as torch exports it, with one opaque node for each quantized layer and quantizer.

``Layer`` (domain ptq_tdq, attribute ``name``) stands for a quantized layer with its input quantizers, ``Quantizer`` for
one operand of an attention product. No name or pattern of the exporter's own is relied upon.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Set
from dataclasses import dataclass, replace
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from ptq_tdq.artifacts import Artifact
from ptq_tdq.calls import Calls
from ptq_tdq.carried import refuse_carried
from ptq_tdq.errors import ModelError
from ptq_tdq.export.onnx.geometry import unpadded
from ptq_tdq.export.onnx.reads import DECISION, MASK, Read
from ptq_tdq.export.onnx.signature import Rows, Signature, describe
from ptq_tdq.export.onnx.tracing import DOMAIN, Call, ReadsValuesError, convert, quiet
from ptq_tdq.load import build_quantized
from ptq_tdq.timeaxis import at

METADATA = DOMAIN  # the key of what a file says of itself
IR_VERSION = 10
_log = logging.getLogger(__name__)
MOST_VALUES = 4  # of what a graph holds: prompts and negative prompts
BATCH, ROWS_OF = "batch", "rows of "  # free sizes: the samples, and how the rows of what has several for each begin
_SPATIAL = {4: ("height", "width"), 5: ("frames", "height", "width")}


@dataclass(frozen=True)
class Skeleton:
    """The exported graph, the layers behind its opaque nodes by name, and how the model is called.

    ``sizes`` says what the exporter's symbols in shapes stand for: a name where the size may vary, else a number.
    Without :data:`BATCH` among the names the graph is of a fixed number of samples, mostly of one.
    """

    model: ir.Model
    layers: dict[str, nn.Module]
    signature: Signature
    sizes: dict[str, str | int]

    @property
    def free(self) -> list[str]:
        """Names of the sizes that may vary."""
        return sorted({name for name in self.sizes.values() if isinstance(name, str)})

    @property
    def ends(self) -> set[str]:
        """Names of the layers whose output is one of the graph's."""
        layers = (node for node in self.model.graph if node.domain == DOMAIN and node.op_type == "Layer")
        return {node.attributes["name"].as_string() for node in layers if node.outputs[0].is_graph_output()}

    @property
    def batch(self) -> str:
        """The exporter's symbol for the number of samples, or that number."""
        return next((symbol for symbol, own in self.sizes.items() if own == BATCH), str(self.signature.samples))


def make_skeleton(
    artifact: Artifact, calls: Calls, model: nn.Module | None = None, fixed: Collection[str] = ()
) -> Skeleton:
    """Export the artifact's model (some 10 s to some minutes) as it is called in ``calls``.

    ``model`` is one of the same structure, for classes that are not diffusers' own.
    The batch may vary, and the sizes of an image where the model itself takes others, but those ``fixed``; a model
    whose batch cannot vary, such as one that takes lists, is exported for one sample. Arguments whose values the
    model's code reads are held: the graph has a sample for each of their values in ``calls``. Raises
    :class:`ModelError` for a model that torch cannot export, or that computes with what it keeps from call to call.
    """
    quantized = build_quantized(artifact, model).float()
    signature, rows, count = describe(quantized, calls)
    refuse_carried(quantized, calls)
    layers = {name: unpadded(layer.layer)[0] for name, layer in quantized.layers().items()}
    call, samples = Call(quantized, signature).eval(), [0]
    try:
        graph, inputs, free = _exported(call, rows, samples, fixed)
    except ReadsValuesError as refusal:
        samples = _hold(call, rows, count, refusal)
        graph, inputs, free = _exported(call, rows, samples, fixed)
    checked = len(graph.graph.outputs) > len(signature.output_names())
    return _named(graph, replace(call.signature, checked=checked), layers, inputs, free)


def _exported(
    call: Call, rows: Rows, samples: list[int], fixed: Collection[str]
) -> tuple[ir.Model, dict[str, Tensor], set[str]]:
    """The graph of any batch and size, of any batch, or of ``samples``; its inputs, and the names of its free sizes."""
    signature = call.signature
    if all(leaf.kind != "each" for leaf in signature.tensors()) and not signature.held():
        inputs = rows([0, 1])
        with at(torch.zeros(1)):
            spatial = [name for name in _spatial(signature, inputs) if name not in fixed]
            takes = tuple(name for name in spatial if _accepts(call, signature, rows, name))
        for sizes in dict.fromkeys((takes, ())):
            try:
                exported = call.export(inputs, _axes(signature, inputs, sizes))
                free = {name for name in (BATCH, *sizes) if _accepts(exported.module(), signature, rows, name)}
                if BATCH in free:
                    return convert(exported).model, inputs, free
            except ReadsValuesError:
                break
            except ModelError:  # code that looks up sizes may take a fixed one
                continue
    inputs = {leaf.name: rows(samples)[leaf.name] for leaf in signature.leaves()}
    return convert(call.export(inputs, {})).model, inputs, set()


def _hold(call: Call, rows: Rows, count: int, refusal: ModelError) -> list[int]:
    """Make the arguments whose values are read part of the model; returns one of the ``count`` rows for each value.

    Code that reads what follows from x or t is tried in training mode: mixtures of experts sort tokens by their expert
    where they are to be fast, and choose them by masks, which a graph can have, where they learn.
    """
    signature, one = call.signature, rows([0])
    varying = {x.name for x in signature.tensors() if x.name.partition(".")[0] in (signature.main, signature.time)}
    reads = call.listen(one)
    sorting = [read.module for read in _fixed(reads, varying) if read.sources & varying]
    if sorting and call.same_in_training(sorting, one):
        reads = call.listen(one)
    names = frozenset[str]().union(*(read.sources for read in _fixed(reads, varying)))
    if not reads or names & varying:
        raise refusal
    samples: dict[Any, int] = {}
    for row in range(count):
        held = signature.holding({name: rows([row])[name] for name in names}, 1).held()
        samples.setdefault(tuple(leaf.held for leaf in held), row)
    if names:
        reason = f"the model's code reads the values of {', '.join(sorted(names))}, and the graph holds them"
        if len(samples) > MOST_VALUES:
            raise ModelError(
                f"At most {MOST_VALUES} kinds of samples fit into a graph, the calls have {len(samples)}; {reason}, "
                "so export it with calls of one prompt and its negative one."
            )
        _log.warning("The graph runs for the values of these calls alone, such as prompts as long: %s.", reason)
    found = list(samples.values())
    call.hold({name: rows(found)[name] for name in names}, len(found))
    return found


def _fixed(reads: list[Read], varying: Set[str]) -> list[Read]:
    """The reads whose answers are part of the graph; it checks decisions, and makes numbers of masks that vary."""
    return [r for r in reads if r.name != DECISION and not (r.name == MASK and r.sources & varying)]


def _named(
    model: ir.Model, signature: Signature, layers: dict[str, nn.Module], inputs: dict[str, Tensor], free: set[str]
) -> Skeleton:
    """The skeleton with names for the inputs, the outputs and the symbols in the shapes."""
    sizes: dict[str, str | int] = {}
    for leaf, value in zip(signature.leaves(), model.graph.inputs, strict=True):
        names = _axes(signature, inputs, free).get(leaf.name, {})
        assert value.shape is not None
        for axis, size in enumerate(inputs[leaf.name].shape):
            named = names.get(axis, "")
            free_size = named in free or (BATCH in free and named.startswith(ROWS_OF))
            free_size &= not isinstance(value.shape[axis], int)  # the exporter itself may take one for a constant
            sizes.setdefault(str(value.shape[axis]), named if free_size else size)
    _tidy(model, signature)
    _keep_wide_axes(model.graph)
    _choose_by_logic(model.graph)
    return Skeleton(model, layers, signature, sizes)


def longer(signature: Signature, inputs: dict[str, Any], name: str) -> Iterator[dict[str, Any]]:
    """``inputs`` with what is denoised one step longer along an axis, and twice as long."""
    x, axis = inputs[signature.main], _spatial(signature, inputs)[name]
    for more in (1, x.shape[axis]):
        yield {**inputs, signature.main: torch.cat([x, x.narrow(axis, 0, more)], axis)}


def _spatial(signature: Signature, inputs: dict[str, Any]) -> dict[str, int]:
    """Names of the axes of what is denoised that may be of another size, and where they are."""
    x = inputs.get(signature.main)
    rank = x.ndim if isinstance(x, Tensor) else 0
    names = _SPATIAL.get(rank, tuple(f"size_{axis}" for axis in range(2, rank)))
    return {name: axis for axis, name in enumerate(names, 2)}


def _axes(signature: Signature, inputs: dict[str, Tensor], sizes: Collection[str]) -> dict[str, dict[int, str]]:
    """By input: the axes that may come out free, and their names; beside those of rows, the ``sizes`` of an image."""
    found = {
        leaf.name: {leaf.dim: f"{ROWS_OF}{leaf.name}" if leaf.several else BATCH}
        for leaf in signature.leaves()
        if leaf.kind == "rows"
    }
    if signature.main in found:
        found[signature.main] |= {a: name for name, a in _spatial(signature, inputs).items() if name in sizes}
    return found


def _accepts(module: nn.Module, signature: Signature, rows: Rows, name: str) -> bool:
    """Whether a model takes another size: three rows, or twice the length along an axis of the image.

    A traced one checks what tracing has assumed; the assumptions are lost in the graph.
    """
    inputs = rows([0, 1, 2]) if name == BATCH else [*longer(signature, rows([0, 1]), name)][-1]
    try:
        with quiet(), torch.no_grad():
            module(inputs)
    except Exception:  # of many unrelated types, and any of them means no
        return False
    return True


def _tidy(model: ir.Model, signature: Signature) -> None:
    """Name the inputs and the outputs; drop what the exporter tells about itself and this machine."""
    model.ir_version, model.producer_name, model.producer_version = IR_VERSION, "ptq-tdq", None
    graph = model.graph
    graph.name = "denoiser"
    inner = [value for node in graph for value in node.outputs]
    for thing in (model, graph, *graph, *graph.inputs, *graph.initializers.values(), *inner):
        thing.metadata_props.clear()
        thing.doc_string = None
    taken = {leaf.name for leaf in signature.leaves()} | set(signature.output_names())
    for number, value in enumerate(inner):
        if value.name in taken:  # the exporter's own names are those of operations
            value.name = f"{value.name}/{number}"
    for value, leaf in zip(graph.inputs, signature.leaves(), strict=True):
        value.name = leaf.name
    for value, name in zip(graph.outputs, signature.output_names(), strict=True):
        value.name = name


def _keep_wide_axes(graph: ir.Graph) -> None:
    """Drop each Squeeze of an axis that is longer than 1: torch leaves such an axis, and its exporter does not."""
    for node in [n for n in graph if n.op_type == "Squeeze"]:
        x, axes = (*node.inputs, None)[:2]
        chosen = None if axes is None else ir.convenience.get_const_tensor(axes)
        if x is None or x.shape is None or chosen is None:
            continue
        # a symbol is never 1: tracing takes such a length for a constant
        if any(str(x.shape[int(axis)]) not in ("1", "None") for axis in chosen.numpy().reshape(-1)):
            ir.convenience.replace_all_uses_with(node.outputs[0], x)
            graph.remove(node, safe=True)


def _choose_by_logic(graph: ir.Graph) -> None:
    """Spell out each Where of truth values, which onnxruntime does not have: (c and a) or (not c and b)."""
    for node in [n for n in graph if n.op_type == "Where" and n.outputs[0].dtype == ir.DataType.BOOL]:
        condition, yes, no = node.inputs
        terms = [ir.node("And", [condition, yes]), ir.node("Not", [condition])]
        terms.append(ir.node("And", [terms[1].outputs[0], no]))
        chosen = ir.node("Or", [terms[0].outputs[0], terms[2].outputs[0]])
        for number, new in enumerate((*terms, chosen)):
            new.name = new.outputs[0].name = f"{node.name}/{new.op_type}_{number}"
            new.outputs[0].type = node.outputs[0].type
        chosen.outputs[0].shape = node.outputs[0].shape
        graph.insert_before(node, (*terms, chosen))
        ir.convenience.replace_all_uses_with(node.outputs[0], chosen.outputs[0], replace_graph_outputs=True)
        graph.remove(node, safe=True)
