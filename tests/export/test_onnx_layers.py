"""Each layer of each file, on the runtime that it is for, against the artifact's own numbers.

A batch holds all steps of a sampling schedule, so each sample has its own t; onnxruntime's file takes them one by one.
Judged is every layer for itself, with the
inputs that the runtime gave it: codes against ``rint(x / s_t) + z_t``, outputs against float64 sums of those codes.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from processors import needs_wide_sums
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear

from ptq_tdq.affine import quantize
from ptq_tdq.artifacts import Artifact
from ptq_tdq.export.onnx.skeleton import Skeleton
from ptq_tdq.intervals.dynamic import Dynamic
from ptq_tdq.records import LayerRecord, QuantizerRecord
from ptq_tdq.scheme import QType
from ptq_tdq.timeaxis import lookup

CASES = ("W4A6", "W8A8-affine", "W8A8-symmetric", "W3A4-dynamic", "W6A8-static")
PAIRS = [  # the runtime that a file is made for, and the one that runs it
    *(
        pytest.param(case, "onnxruntime", "onnxruntime", id=f"{case}-onnxruntime", marks=needs_wide_sums)
        for case in CASES
    ),
    *(pytest.param(case, "openvino", "openvino", id=f"{case}-openvino", marks=needs_wide_sums) for case in CASES),
    *(pytest.param(case, "portable", "onnxruntime", id=f"{case}-portable-onnxruntime") for case in CASES),
    pytest.param("W4A6", "portable", "openvino", id="W4A6-portable-openvino"),
]
STEPS = 11  # of the schedule: t = 0, 100, ..., 1000


def interval(artifact: Artifact, q: QuantizerRecord, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each sample, in a shape that fits x."""
    table, shape = artifact.tables[q.name], (-1,) + (1,) * (x.ndim - 1)
    if table.scale is None:
        scale, zero_point = Dynamic(table.zero_point[0], QType(q.bits))(t, x)
    else:
        scale, zero_point = lookup(table.scale, t), lookup(table.zero_point, t)
    return scale.reshape(shape), zero_point.reshape(shape)


def source_of(graph: onnx.GraphProto, tensor: str, layer: str) -> str:
    """The input of ``layer`` from which ``tensor``, one of its inner values or its output, is made."""
    makers = {output: node for node in graph.node for output in node.output}
    while tensor in makers and (tensor.startswith(f"{layer}/") or tensor.endswith(".codes") or tensor == layer):
        tensor = makers[tensor].input[0]
    return tensor


def unsigned(codes: NDArray[Any], shape: torch.Size) -> Tensor:
    """Codes 0..2^n-1 without the border that a padded input has."""
    border = (codes.shape[-1] - shape[-1]) // 2
    inner = codes[..., border:-border, border:-border] if border else codes
    return torch.from_numpy(inner.astype(np.int64)) + (128 if codes.dtype == np.int8 else 0)


def expected_output(
    artifact: Artifact, record: LayerRecord, module: nn.Module, levels: list[Tensor], scales: list[Tensor]
) -> Tensor:
    """The layer in float64: sum over channel ranges of s_t s_o sum (q - z_t) (w - z_o), plus the bias."""
    shape = (-1,) + (1,) * (artifact.weight_codes[record.name].ndim - 1)
    total: Tensor | float = 0.0
    for i, (low, high) in enumerate(record.ranges):
        codes = artifact.weight_codes[record.name][:, low:high].double()
        zero_point, scale = artifact.weight_zero_point[record.name][:, i], artifact.weight_scale[record.name][:, i]
        weight = (codes - zero_point.double().reshape(shape)) * scale.double().reshape(shape)
        x = levels[i].double() * scales[i].double()
        if isinstance(module, nn.Conv2d):
            total = total + conv2d(x, weight, None, module.stride, module.padding)
        else:
            total = total + linear(x, weight)
    assert isinstance(total, Tensor)
    bias = artifact.float_state.get(f"{record.name}.bias")
    return total if bias is None else total + bias.double().reshape((-1, 1, 1) if total.ndim == 4 else (-1,))


@pytest.mark.parametrize(("case", "made_for", "runs_on"), PAIRS)
def test_every_layer_within_one_code_at_all_steps_of_a_schedule(
    case: str,
    made_for: str,
    runs_on: str,
    artifact_of: Callable[[str], Artifact],
    skeleton: Skeleton,
    encode: Callable[[str, str], bytes],
    run: Callable[..., dict[str, NDArray[Any]]],
    feed: Callable[..., dict[str, Tensor]],
) -> None:
    artifact, data, given = artifact_of(case), encode(case, made_for), feed(STEPS)
    graph = onnx.load_from_string(data).graph
    inner = {q.name: f"{q.name}.codes" for q in artifact.quantizers}
    sources = {q.name: source_of(graph, inner[q.name], layer.name) for layer in artifact.layers for q in layer.inputs}
    sources |= {layer.name: source_of(graph, layer.name, layer.name) for layer in artifact.layers if not layer.inputs}
    results = {
        layer.name: [f"{layer.name}.q*k", f"{layer.name}.softmax*v"] if layer.kind == "product" else [layer.name]
        for layer in artifact.layers
    }
    results[artifact.layers[-1].name] = ["out_sample"]
    wanted = {*inner.values(), *sources.values(), *chain.from_iterable(results.values())} - {"out_sample", *given}
    calls = [given]
    if made_for == "onnxruntime":
        calls = [{k: v[i : i + 1] for k, v in given.items()} for i in range(STEPS)]
    runs = [run(runs_on, data, call, sorted(wanted)) for call in calls]
    got = {name: np.concatenate([found[name] for found in runs]) for name in runs[0]}
    got |= {k: v.numpy() for k, v in given.items()}

    ties = total = 0
    for layer in artifact.layers:
        levels, scales = [], []
        if not layer.inputs:  # only the weight is quantized
            levels, scales = [torch.from_numpy(got[sources[layer.name]])], [torch.ones(())]
        for i, quantizer in enumerate(layer.inputs):
            x = torch.from_numpy(got[sources[quantizer.name]])
            if len(layer.splits) > 2:
                x = x[:, layer.splits[i] : layer.splits[i + 1]]
            scale, zero_point = interval(artifact, quantizer, given["timestep"], x)
            codes = unsigned(got[inner[quantizer.name]], x.shape)
            difference = (codes - quantize(x, scale, zero_point, QType(quantizer.bits))).abs()
            assert difference.max() <= 1, quantizer.name
            ties, total = ties + int(difference.sum()), total + difference.numel()
            levels.append(codes - zero_point)
            scales.append(scale)
        if layer.kind == "product":
            q, k, v, softmax = (n.double() * s.double() for n, s in zip(levels, scales, strict=True))
            outputs = [q @ k.transpose(-1, -2), softmax @ v]
        else:
            outputs = [expected_output(artifact, layer, skeleton.layers[layer.name], levels, scales)]
        for name, output in zip(results[layer.name], outputs, strict=True):
            error = (torch.from_numpy(got[name]).double() - output).abs().max()
            assert error <= 1e-5 * output.abs().max(), name
    assert ties <= 1e-3 * total
