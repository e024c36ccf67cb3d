"""Intervals of what convolutions give: 8 bits over the range that it has in the recorded calls of some time steps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ptq_tdq.affine import choose_qparams
from ptq_tdq.calls import Calls
from ptq_tdq.export.onnx.geometry import CONVS
from ptq_tdq.modules import QuantLayer
from ptq_tdq.modules.layers import layer_input, own_weight
from ptq_tdq.quantized_model import QuantizedModel
from ptq_tdq.scheme import QType
from ptq_tdq.timed_model import in_float32

ROWS = 16  # of a call
EIGHT = QType(8)
OutputInterval = tuple[np.float32, np.uint8]  # scale and zero point
Outputs = dict[str, list[OutputInterval]]  # one for each channel range of a layer, by its name


@torch.no_grad()
def outputs_of(quantized: QuantizedModel, calls: Calls) -> Outputs:
    """The intervals of convolutions whose input is quantized, in ``calls``; the first channel range has the bias."""
    layers = {
        name: layer
        for name, layer in quantized.layers().items()
        if layer.record.inputs and isinstance(layer.layer, CONVS)
    }
    ranges: dict[str, Tensor] = {}  # [channel ranges, 2]

    def note(name: str) -> Any:
        def hook(layer: QuantLayer, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            x = layer_input(args, kwargs)
            assert x is not None
            found = torch.stack([torch.stack(part.aminmax()) for part in _parts(layer, x, output)])
            before = ranges.get(name, found)
            ranges[name] = torch.stack([before[:, 0].minimum(found[:, 0]), before[:, 1].maximum(found[:, 1])], 1)

        return hook

    hooks = [layer.register_forward_hook(note(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        for rows in calls.chunks(ROWS):
            quantized(**in_float32(calls.inputs(rows)))
    finally:
        for hook in hooks:
            hook.remove()
    return {name: list(_intervals(found)) for name, found in ranges.items()}


def _parts(layer: QuantLayer, x: Tensor, output: Tensor) -> Iterator[Tensor]:
    """The share of each channel range in an output."""
    if len(layer.ranges) == 1:
        yield output
        return
    codes = layer.quantized_input(x)
    for index, (low, high) in enumerate(layer.ranges):
        alone = torch.zeros_like(codes)
        alone[:, low:high] = codes[:, low:high]
        yield layer.kind.operation(layer.layer, alone, own_weight(layer.layer), None if index else layer.bias)


def _intervals(ranges: Tensor) -> Iterator[OutputInterval]:
    for low, high in ranges:
        scale, zero_point = choose_qparams(low, high, EIGHT)
        yield np.float32(scale), np.uint8(zero_point)
