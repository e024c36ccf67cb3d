"""The skeleton: the model's graph as torch exports it, with one opaque node for each quantized layer and quantizer.

``Layer`` (domain ptq_tdq, attribute ``name``) stands for a quantized Conv or Linear with its input quantizers,
``Quantizer`` for one operand of an attention product. No name or pattern of the exporter's own is relied upon.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch import Tensor, nn

from ptq_tdq.artifacts import Artifact
from ptq_tdq.errors import ModelError
from ptq_tdq.export.onnx.geometry import output_shape
from ptq_tdq.load import build_quantized
from ptq_tdq.modules import ActivationQuantizer
from ptq_tdq.quantized_model import QuantizedModel

DOMAIN = "ptq_tdq"
OPSET, IR_VERSION = 21, 10
SAMPLE, TIMESTEP, LABELS, OUTPUT = "sample", "timestep", "class_labels", "out_sample"


@dataclass(frozen=True)
class Skeleton:
    """The exported graph, and the layers behind its opaque nodes, by name."""

    model: ir.Model
    layers: dict[str, nn.Module]


class _Layer(nn.Module):
    def __init__(self, layer: nn.Module, name: str) -> None:
        super().__init__()
        self.layer, self.name = layer, name

    def forward(self, x: Tensor) -> Tensor:
        shape = output_shape(self.layer, x)
        return torch.onnx.ops.symbolic(
            f"{DOMAIN}::Layer", [x], attrs={"name": self.name}, dtype=x.dtype, shape=shape, version=1
        )


class _Quantizer(ActivationQuantizer):
    def forward(self, x: Tensor) -> Tensor:
        return torch.onnx.ops.symbolic(
            f"{DOMAIN}::Quantizer", [x], attrs={"name": self.record.name}, dtype=x.dtype, shape=x.shape, version=1
        )


class _Call(nn.Module):
    """The U-Net with positional arguments and a tensor as its result."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> Tensor:
        labels = {} if class_labels is None else {LABELS: class_labels}
        result: Tensor = self.model(sample, timestep, return_dict=False, **labels)[0]
        return result


def make_skeleton(artifact: Artifact) -> Skeleton:
    """Export the artifact's model (some 10 to 30 s).

    Inputs: ``sample`` float32 [batch, C, height, width], ``timestep`` float32 [batch] and, for class-conditional
    models, ``class_labels`` int64 [batch]; output ``out_sample``, of the shape of ``sample``. Raises
    :class:`ModelError` for a model that torch cannot export.
    """
    quantized = build_quantized(artifact).float()
    layers = {name: layer.layer for name, layer in quantized.layers().items()}
    config = quantized.config
    _mark(quantized)
    arguments, dynamic = [], torch.export.Dim.DYNAMIC
    side = 2 ** len(config.block_out_channels)  # different multiples, lest the exporter takes two sizes for one
    arguments = [torch.zeros(2, config.in_channels, 2 * side, 3 * side), torch.zeros(2)]
    shapes: list[dict[int, object]] = [{0: dynamic, 2: dynamic, 3: dynamic}, {0: dynamic}]
    if config.num_class_embeds:
        arguments.append(torch.zeros(2, dtype=torch.int64))
        shapes.append({0: dynamic})
    with _quiet():
        try:
            program = torch.onnx.export(
                _Call(quantized.model).eval(),
                tuple(arguments),
                dynamo=True,
                dynamic_shapes=tuple(shapes),
                opset_version=OPSET,
                verbose=False,
            )
        except (torch.onnx.OnnxExporterError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ModelError(f"torch cannot export the model to ONNX ({reason}).") from error
    assert program is not None
    _tidy(program.model)
    return Skeleton(program.model, layers)


def _mark(quantized: QuantizedModel) -> None:
    """Put opaque modules in the place of quantized layers and of the quantizers of attention products."""
    for name, layer in quantized.layers().items():
        parent, _, own = name.rpartition(".")
        setattr(quantized.model.get_submodule(parent), own, _Layer(layer.layer, name))
    for module in quantized.model.modules():
        for key, child in list(module.named_children()):
            if type(child) is ActivationQuantizer:
                marker = _Quantizer(child.record, child.clock)
                marker.enabled = True
                setattr(module, key, marker)


def _tidy(model: ir.Model) -> None:
    """Name the inputs and the output; drop what the exporter tells about itself and this machine."""
    model.ir_version, model.producer_name, model.producer_version = IR_VERSION, "ptq-tdq", None
    graph = model.graph
    graph.name = "unet"
    inner = [value for node in graph for value in node.outputs]
    for thing in (model, graph, *graph, *graph.inputs, *graph.initializers.values(), *inner):
        thing.metadata_props.clear()
        thing.doc_string = None
    for value, name in zip(graph.inputs, (SAMPLE, TIMESTEP, LABELS), strict=False):
        value.name = name
    graph.outputs[0].name = OUTPUT


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back what the exporter says about packages that are not installed and about its own future."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
