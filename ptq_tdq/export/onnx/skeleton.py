"""The skeleton: the model's graph as torch exports it, with one opaque node for each quantized layer and quantizer.

``Layer`` (domain ptq_tdq, attribute ``name``) stands for a quantized layer with its input quantizers, ``Quantizer`` for
one operand of an attention product. No name or pattern of the exporter's own is relied upon.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils import _pytree as pytree

from ptq_tdq.artifacts import Artifact
from ptq_tdq.calls import Calls
from ptq_tdq.errors import ModelError
from ptq_tdq.export.onnx.geometry import output_shape, unpadded
from ptq_tdq.export.onnx.reals import InReals, has_complex
from ptq_tdq.export.onnx.rewrite import InOtherWords
from ptq_tdq.export.onnx.signature import Signature, describe
from ptq_tdq.load import build_quantized
from ptq_tdq.modules import ActivationQuantizer
from ptq_tdq.quantized_model import QuantizedModel
from ptq_tdq.timeaxis import at

DOMAIN = METADATA = "ptq_tdq"  # of our nodes, and the key of what a file says of itself
OPSET, IR_VERSION = 21, 10
BATCH = "batch"
_SPATIAL = {4: ("height", "width"), 5: ("frames", "height", "width")}


@dataclass(frozen=True)
class Skeleton:
    """The exported graph, the layers behind its opaque nodes by name, and how the model is called.

    ``sizes`` says what the exporter's symbols in shapes stand for: a name where the size may vary, else a number.
    Without :data:`BATCH` among the names the graph is of one sample.
    """

    model: ir.Model
    layers: dict[str, nn.Module]
    signature: Signature
    sizes: dict[str, str | int]

    @property
    def free(self) -> list[str]:
        """Names of the sizes that may vary."""
        return sorted({name for name in self.sizes.values() if isinstance(name, str)})

    def symbol(self, name: str) -> str | None:
        """The exporter's symbol for the size ``name``."""
        return next((symbol for symbol, own in self.sizes.items() if own == name), None)


class _Layer(nn.Module):
    def __init__(self, layer: nn.Module, name: str) -> None:
        super().__init__()
        self.layer, self.name = layer, name
        self.plain, self.pad = unpadded(layer)

    def forward(self, input: Tensor) -> Tensor:  # torch's layers are called by this name too
        x = self.pad(input)
        shape = output_shape(self.plain, x)
        return torch.onnx.ops.symbolic(
            f"{DOMAIN}::Layer", [x], attrs={"name": self.name}, dtype=x.dtype, shape=shape, version=1
        )

    def __getattr__(self, name: str) -> Any:
        """What models ask of their layers beside calling them."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)


class _Quantizer(ActivationQuantizer):
    def forward(self, x: Tensor) -> Tensor:
        return torch.onnx.ops.symbolic(
            f"{DOMAIN}::Quantizer", [x], attrs={"name": self.record.name}, dtype=x.dtype, shape=x.shape, version=1
        )


class _Call(nn.Module):
    """The model with a dictionary of tensors as its only argument, and all tensors that it returns as its result."""

    def __init__(self, model: nn.Module, signature: Signature) -> None:
        super().__init__()
        self.model, self.signature = model, signature

    def forward(self, tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
        leaves = pytree.tree_leaves(self.model(**self.signature.fill(tensors)))
        return tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))


def make_skeleton(artifact: Artifact, calls: Calls, model: nn.Module | None = None) -> Skeleton:
    """Export the artifact's model (some 10 s to some minutes) as it is called in ``calls``.

    ``model`` is one of the same structure, for classes that are not diffusers' own.
    The batch may vary, and the sizes of an image where the model itself takes others; a model whose batch cannot vary,
    such as one that takes lists, is exported for one sample. Raises :class:`ModelError` for a model that torch cannot
    export.
    """
    quantized = build_quantized(artifact, model).float()
    signature, rows = describe(quantized, calls)
    layers = {name: unpadded(layer.layer)[0] for name, layer in quantized.layers().items()}
    call = _Call(quantized.model, signature).eval()
    free: set[str] = set()
    if all(leaf.kind != "each" for leaf in signature.leaves()):
        inputs = rows(2)
        with at(torch.zeros(1)):
            takes = [name for name in _spatial(signature, inputs) if _accepts(call, signature, rows, name)]
        _mark(quantized)
        with suppress(ModelError):  # code that looks up sizes may take a fixed one
            exported = _export(call, inputs, _axes(signature, inputs, takes))
            free = {name for name in (BATCH, *takes) if _accepts(exported.module(), signature, rows, name)}
    else:
        _mark(quantized)
    if BATCH not in free:
        inputs, free = rows(1), set()
        exported = _export(call, inputs, {})
    program = _convert(exported)
    return _named(program.model, signature, layers, inputs, free)


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
            free_size = named in free or (BATCH in free and named.startswith("rows of "))
            sizes.setdefault(str(value.shape[axis]), named if free_size else size)
    _tidy(model, signature)
    _keep_wide_axes(model.graph)
    _choose_by_logic(model.graph)
    return Skeleton(model, layers, signature, sizes)


def _spatial(signature: Signature, inputs: dict[str, Tensor]) -> dict[str, int]:
    """Names of the axes of what is denoised that may be of another size, and where they are."""
    rank = inputs[signature.main].ndim if signature.main in inputs else 0
    names = _SPATIAL.get(rank, tuple(f"size_{axis}" for axis in range(2, rank)))
    return {name: axis for axis, name in enumerate(names, 2)}


def _axes(signature: Signature, inputs: dict[str, Tensor], sizes: Collection[str]) -> dict[str, dict[int, str]]:
    """By input: the axes that may come out free, and their names; beside those of rows, the ``sizes`` of an image."""
    found = {
        leaf.name: {leaf.dim: f"rows of {leaf.name}" if leaf.several else BATCH}
        for leaf in signature.leaves()
        if leaf.kind == "rows"
    }
    if signature.main in found:
        found[signature.main] |= {a: name for name, a in _spatial(signature, inputs).items() if name in sizes}
    return found


def _export(call: _Call, inputs: dict[str, Tensor], free: dict[str, dict[int, str]]) -> torch.export.ExportedProgram:
    """The traced model; the axes ``free`` become constants where the model's own code needs that."""
    shapes = ({name: dict.fromkeys(free.get(name, ()), torch.export.Dim.AUTO) for name in inputs},)
    words = InOtherWords()
    with _refusals(words.reads):
        with words:
            exported = torch.export.export(call, (inputs,), dynamic_shapes=shapes, strict=False)
        if has_complex(exported):
            exported = torch.export.export(InReals(exported), (inputs,), dynamic_shapes=shapes, strict=False)
        return exported


def _accepts(module: nn.Module, signature: Signature, rows: Callable[[int], dict[str, Tensor]], name: str) -> bool:
    """Whether a model takes another size: three rows, or twice the length along an axis of the image.

    A traced one checks what tracing has assumed; the assumptions are lost in the graph.
    """
    inputs = rows(3 if name == BATCH else 2)
    if name != BATCH:
        x, axis = inputs[signature.main], _spatial(signature, inputs)[name]
        inputs[signature.main] = torch.cat([x, x], axis)
    try:
        with _quiet(), torch.no_grad():
            module(inputs)
    except Exception:  # of many unrelated types, and any of them means no
        return False
    return True


def _convert(exported: torch.export.ExportedProgram) -> Any:
    with _refusals():
        return torch.onnx.export(exported, dynamo=True, opset_version=OPSET, verbose=False)


@contextmanager
def _refusals(reads: Collection[str] = ()) -> Iterator[None]:
    """One sentence for whatever torch, or the model's own code, says while it is traced.

    ``reads`` are the ways in which the code has read values of tensors by then.
    """
    try:
        with _quiet(), torch.no_grad():
            yield
    except ModelError:
        raise
    except Exception as error:  # of many unrelated types
        reason = _reason(error)
        if reads or _depends_on_values(error):
            read = f" ({', '.join(sorted(reads))})" if reads else ""
            reason = f"its code depends on values of tensors{read}, and a graph is one code for all"
        raise ModelError(f"torch cannot export the model to ONNX ({reason}).") from error


def _reason(error: BaseException) -> str:
    """The first line of the innermost cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")[:200]


def _depends_on_values(error: BaseException) -> bool:
    """Whether tracing has met a size or a choice that only the values of a tensor tell."""
    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    unknown = ("non-nested SymInt", "should have been constant")  # a size where the code needs a number
    return any(isinstance(e, GuardOnDataDependentSymNode) or any(u in str(e) for u in unknown) for e in causes)


def _mark(quantized: QuantizedModel) -> None:
    """Put opaque modules in the place of quantized layers and of the quantizers of attention products."""
    for name, layer in quantized.layers().items():
        parent, _, own = name.rpartition(".")
        setattr(quantized.model.get_submodule(parent), own, _Layer(layer.layer, name))
    for module in quantized.model.modules():
        for key, child in list(module.named_children()):
            if type(child) is ActivationQuantizer:
                marker = _Quantizer(child.record)
                marker.enabled = True
                setattr(module, key, marker)


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


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back what the exporter says about packages that are not installed and about its own future."""
    levels = {logger: logger.level for logger in map(logging.getLogger, ("torch.onnx", "onnxscript"))}
    for logger in levels:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
