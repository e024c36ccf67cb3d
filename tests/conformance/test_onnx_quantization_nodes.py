"""The quantization cases of ONNX's own node test suite, built in memory by the installed ``onnx`` package."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import conv2d

from ptq_tdq.affine import choose_qparams, dequantize, quantize
from ptq_tdq.scheme import QType

MODULES = (
    "convinteger",
    "dequantizelinear",
    "dynamicquantizelinear",
    "matmulinteger",
    "qlinearconv",
    "qlinearmatmul",
    "quantizelinear",
)
QTYPES = {
    "UINT8": QType(8),
    "INT8": QType(8, signed=True),
    "UINT4": QType(4),
    "INT4": QType(4, signed=True),
    "UINT2": QType(2),
    "INT2": QType(2, signed=True),
}
FLOAT8, FLOAT4, WIDE = "float8 is not an integer code", "float4 is not an integer code", "codes have at most 8 bits"
NOT_COVERED = {
    "test_dequantizelinear_e4m3fn": FLOAT8,
    "test_dequantizelinear_e4m3fn_float16": FLOAT8,
    "test_dequantizelinear_e4m3fn_zero_point": FLOAT8,
    "test_dequantizelinear_e5m2": FLOAT8,
    "test_quantizelinear_e4m3fn": FLOAT8,
    "test_quantizelinear_e5m2": FLOAT8,
    "test_dequantizelinear_float4e2m1": FLOAT4,
    "test_quantizelinear_float4e2m1": FLOAT4,
    "test_dequantizelinear_uint16": WIDE,
    "test_dequantizelinear_int16": WIDE,
    "test_quantizelinear_uint16": WIDE,
    "test_quantizelinear_int16": WIDE,
    "test_quantizelinear_blocked_symmetric": WIDE,
}
COVERED = 32  # of the 45 cases of onnx 1.23


def all_cases() -> dict[str, Any]:
    # collect_testcases() would build all 1900 cases; importing a module of cases builds those of that module
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some builders overflow on purpose
        for name in MODULES:
            import_module(f"onnx.backend.test.case.node.{name}")
    cases = import_module("onnx.backend.test.case.node")._NodeTestCases
    return {c.name: c for c in cases if c.name.startswith(tuple(f"test_{name}" for name in MODULES))}


CASES = all_cases()


def typed(value: Any) -> tuple[NDArray[Any], QType | None]:
    """Value and code type of an input, an output (an array, or a TensorProto where numpy has no such type)."""
    if isinstance(value, onnx.TensorProto):
        name = onnx.TensorProto.DataType.Name(value.data_type)
        return onnx.numpy_helper.to_array(value), QTYPES.get(name)
    return np.asarray(value), QTYPES.get(np.asarray(value).dtype.name.upper())


def tensor(value: Any) -> Tensor:
    """Codes as int32, real values as they are."""
    array, qtype = typed(value)
    return torch.from_numpy(np.array(array.astype(np.int32) if qtype else array))


def over(parameter: Tensor, shape: torch.Size, axis: int, block: int) -> Tensor:
    """A scale or zero point, broadcast against ``shape``: per tensor, per axis or blocked (ONNX QuantizeLinear)."""
    if parameter.numel() == 1:
        return parameter.reshape(())
    if parameter.ndim == 1:
        return parameter.view([-1 if i == axis % len(shape) else 1 for i in range(len(shape))])
    return parameter.repeat_interleave(block, axis)


def quantize_linear(node: Any, inputs: list[Any], qtype: QType) -> list[Tensor]:
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    axis, block = attributes.get("axis", 1), attributes.get("block_size", 0)
    x, scale, zero_point = (tensor(i) for i in inputs)
    return [quantize(x, over(scale, x.shape, axis, block), over(zero_point, x.shape, axis, block), qtype)]


def dequantize_linear(node: Any, inputs: list[Any], qtype: QType) -> list[Tensor]:
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    axis, block = attributes.get("axis", 1), attributes.get("block_size", 0)
    codes, scale, zero_point = (tensor(i) for i in inputs)
    return [dequantize(codes, over(scale, codes.shape, axis, block), over(zero_point, codes.shape, axis, block))]


def dynamic_quantize_linear(node: Any, inputs: list[Any], qtype: QType) -> list[Tensor]:
    x = tensor(inputs[0])
    scale, zero_point = choose_qparams(x.min(), x.max(), qtype)
    return [quantize(x, scale, zero_point, qtype), scale, zero_point]


def matmul_integer(node: Any, inputs: list[Any], qtype: QType) -> list[Tensor]:
    a, b, a_zero, b_zero = (tensor(i) for i in inputs)
    return [(a - a_zero) @ (b - b_zero)]


def qlinear_matmul(node: Any, inputs: list[Any], qtype: QType) -> list[Tensor]:
    a, a_scale, a_zero, b, b_scale, b_zero, y_scale, y_zero = (tensor(i) for i in inputs)
    product = dequantize((a - a_zero) @ (b - b_zero), a_scale.double() * b_scale.double(), torch.tensor(0))
    return [quantize(product, y_scale.double(), y_zero, qtype)]


def integer_conv(node: Any, x: Tensor, w: Tensor) -> Tensor:
    pads = {a.name: list(a.ints) for a in node.attribute}.get("pads", [0, 0, 0, 0])
    assert pads[:2] == pads[2:]
    return conv2d(x.double(), w.double(), padding=pads[:2])  # exact: integers below 2^53


def conv_integer(node: Any, inputs: list[Any], qtype: QType) -> list[Tensor]:
    x, w, x_zero, *rest = (tensor(i) for i in inputs)
    w_zero = rest[0].view(-1, 1, 1, 1) if rest else torch.tensor(0)
    return [integer_conv(node, x - x_zero, w - w_zero).to(torch.int32)]


def qlinear_conv(node: Any, inputs: list[Any], qtype: QType) -> list[Tensor]:
    x, x_scale, x_zero, w, w_scale, w_zero, y_scale, y_zero = (tensor(i) for i in inputs)
    sums = integer_conv(node, x - x_zero, w - w_zero.view(-1, 1, 1, 1))
    real = dequantize(sums, x_scale.double() * w_scale.double().view(-1, 1, 1), torch.tensor(0))
    return [quantize(real, y_scale.double(), y_zero, qtype)]


OPERATORS: dict[str, Callable[[Any, list[Any], QType], list[Tensor]]] = {
    "QuantizeLinear": quantize_linear,
    "DequantizeLinear": dequantize_linear,
    "DynamicQuantizeLinear": dynamic_quantize_linear,
    "MatMulInteger": matmul_integer,
    "QLinearMatMul": qlinear_matmul,
    "ConvInteger": conv_integer,
    "QLinearConv": qlinear_conv,
}


def operator(name: str) -> str:
    """The operator of a case; an ``_expanded`` case writes the same one out in simpler nodes."""
    return next(o for o in OPERATORS if name.startswith(f"test_{o.lower()}"))


def test_every_case_is_either_covered_or_listed_with_a_reason() -> None:
    assert set(NOT_COVERED) <= set(CASES)
    assert len(set(CASES) - set(NOT_COVERED)) == COVERED


@pytest.mark.parametrize("name", sorted(set(CASES) - set(NOT_COVERED)))
def test_case(name: str) -> None:
    case = CASES[name]
    assert len(case.data_sets) == 1
    inputs, outputs = case.data_sets[0]
    codes = [qtype for value in (outputs[0], *inputs) if (qtype := typed(value)[1])]
    found = OPERATORS[operator(name)](case.model.graph.node[0], list(inputs), codes[0] if codes else QType(8))
    assert len(found) == len(outputs)
    for ours, theirs in zip(found, outputs, strict=True):
        expected = tensor(theirs)
        assert ours.shape == expected.shape
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)  # codes: exactly, for integers no rtol applies
        if not expected.is_floating_point():
            assert torch.equal(ours, expected)
