"""The files run as integers on the runtime that they are for: what the runtime itself says that it executes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import openvino
import pytest

from ptq_tdq.artifacts import Artifact

CASES = ("W4A6", "W8A8-affine", "W8A8-symmetric")
PRODUCTS = {"Convolution", "FullyConnected", "MatMul"}


def expected(artifact: Artifact) -> int:
    """Products of integers: one for each channel range of a layer, two for each attention."""
    return sum(2 if layer.kind == "product" else len(layer.inputs) for layer in artifact.layers)


@pytest.mark.parametrize("case", CASES)
def test_onnxruntime_executes_integer_products(
    case: str, tmp_path: Path, encode: Callable[[str, str], bytes], artifact_of: Callable[[str], Artifact]
) -> None:
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(encode(case, "onnxruntime"), options, providers=["CPUExecutionProvider"])
    kinds = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    integers = {"ConvInteger", "MatMulInteger", "MatMulIntegerToFloat"}
    assert sum(kinds[kind] for kind in integers) == expected(artifact_of(case))
    assert not set(kinds) & {"Conv", "Gemm", "MatMul", "FusedMatMul", "MatMulNBits"}


@pytest.mark.parametrize("case", CASES)
def test_openvino_executes_integer_products(
    case: str, encode: Callable[[str, str], bytes], artifact_of: Callable[[str], Artifact]
) -> None:
    core = openvino.Core()
    model = core.read_model(encode(case, "openvino"), b"")
    model.reshape({"sample": [2, 3, 8, 8], "timestep": [2], "class_labels": [2]})
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def said(node: Any, key: str) -> str:
        value = node.get_rt_info()[key]
        return str(getattr(value, "value", value))

    nodes = compiled.get_runtime_model().get_ops()
    products = Counter(said(n, "primitiveType").rpartition("_")[2] for n in nodes if said(n, "layerType") in PRODUCTS)
    assert products["I8"] == expected(artifact_of(case))
