"""Quantized convolutions and linear layers: one table from a torch layer class to its kind and operation.

Layouts: x [B, C, ...] or [B, ..., C] of a Linear; weight [O, C, ...]. A split shortcut has two channel ranges
(``splits`` = (0, C_h, C)), each with quantizers of its own; an ordinary layer has one, (0, C).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ptq_tdq.modules.activation import ActivationQuantizer
from ptq_tdq.modules.weight import WeightQuantizer
from ptq_tdq.records import LayerRecord

Operation = Callable[[Any, Tensor, Tensor, Tensor | None], Tensor]


def _conv(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y: Tensor = layer._conv_forward(x, weight, bias)
    return y


def _linear(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return functional.linear(x, weight, bias)


QUANTIZED_LAYERS: dict[type[nn.Module], tuple[str, int, Operation]] = {  # class -> kind, channel dim of x, operation
    nn.Conv1d: ("conv1d", 1, _conv),
    nn.Conv2d: ("conv2d", 1, _conv),
    nn.Conv3d: ("conv3d", 1, _conv),
    nn.Linear: ("linear", -1, _linear),
}


def _entry(layer: nn.Module) -> tuple[str, int, Operation] | None:
    return next((entry for cls, entry in QUANTIZED_LAYERS.items() if isinstance(layer, cls)), None)


def layer_kind(layer: nn.Module) -> str | None:
    """The kind of a layer ("conv1d", "conv2d", "conv3d", "linear"), or None for a module that is not quantized as one."""
    entry = _entry(layer)
    return entry[0] if entry else None


def layer_operation(layer: nn.Module, x: Tensor) -> Tensor:
    """What a layer of this kind computes from its weight and bias; a subclass may do something else in its forward."""
    entry = _entry(layer)
    assert entry is not None
    result: Tensor = entry[2](layer, x, layer.weight, layer.bias)
    return result


def multiply_accumulates(layer: nn.Module, output: Tensor) -> int:
    """Multiply-accumulates of one layer for the given output."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return output.numel() // weight.shape[0] * weight.numel()


class QuantLayer(nn.Module):
    """A layer whose weight and input pass through quantizers; with both off it is the original, bit for bit.

    ``shift`` [O] is the learned correction of the bias (None without a bias); it counts while the weights' quantizers
    are on, and :meth:`finalize` adds it to the bias.
    """

    def __init__(self, layer: nn.Module, record: LayerRecord) -> None:
        super().__init__()
        entry = _entry(layer)
        if entry is None:
            raise TypeError(f"{type(layer).__name__} has no quantized form.")
        _, self.channel_dim, self.operation = entry
        assert record.weight_bits is not None
        self.layer, self.record = layer, record
        self.ranges = tuple(pairwise(record.splits))
        self.weights = nn.ModuleList(WeightQuantizer(record.weight_bits) for _ in self.ranges)
        self.inputs = nn.ModuleList(ActivationQuantizer(q) for q in record.inputs)
        self.weights_enabled = False
        self.shift = None if self.bias is None else nn.Parameter(torch.zeros_like(self.bias), requires_grad=False)
        self._final: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """The layer's own weight; the original until ``finalize``."""
        weight = self.layer.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The layer's own bias [O], or None."""
        bias = self.layer.bias
        assert bias is None or isinstance(bias, Tensor)
        return bias

    def __getattr__(self, name: str) -> Any:
        """What models ask of their layers beside calling them: sizes, strides and the like."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)

    def weight_quantizers(self) -> list[WeightQuantizer]:
        return [w for w in self.weights if isinstance(w, WeightQuantizer)]

    def part(self, index: int) -> Tensor:
        """Channel range ``index`` of the original weight."""
        lo, hi = self.ranges[index]
        return self.weight[:, lo:hi]

    def assign(self, index: int, codes: Tensor, scale: Tensor, zero_point: Tensor) -> None:
        """Final codes of one channel range."""
        self.weight_quantizers()[index].assign(codes, scale, zero_point)
        self._final = None

    def quantized_weight(self) -> Tensor:
        """The weight of all ranges: soft while rounding is learned, else what the codes stand for."""
        quantizers = self.weight_quantizers()
        if any(w.rounding is not None for w in quantizers):
            return torch.cat([w.rounding.soft_weight() if w.rounding else w.dequantized() for w in quantizers], dim=1)
        if self._final is None:
            self._final = torch.cat([w.dequantized() for w in quantizers], dim=1)
        return self._final

    def finalize(self) -> None:
        """Replace the original weight by the quantized one, and the bias by the corrected one."""
        with torch.no_grad():
            self.weight.copy_(self.quantized_weight())
            if self.bias is not None and self.shift is not None:
                self.bias.add_(self.shift)
                self.shift.zero_()
        self._final = self.weight

    def quantized_input(self, x: Tensor) -> Tensor:
        """The input behind its quantizers: one for each channel range, none where only the weight is quantized."""
        if len(self.inputs) == 1:
            y: Tensor = self.inputs[0](x)
            return y
        if not self.inputs:
            return x
        sizes = [hi - lo for lo, hi in self.ranges]
        parts = x.split(sizes, self.channel_dim)
        return torch.cat([q(p) for q, p in zip(self.inputs, parts, strict=True)], self.channel_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.quantized_input(x)
        if not self.weights_enabled:
            return self.operation(self.layer, x, self.weight, self.bias)
        bias = None if self.bias is None or self.shift is None else self.bias + self.shift
        return self.operation(self.layer, x, self.quantized_weight().to(x.dtype), bias)
