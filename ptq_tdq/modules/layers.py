"""Quantized convolutions and linear layers: one table from a torch layer class to its kind and operation.

Layouts: x [B, C, ...] or [B, ..., C] of a Linear; weight [O, C / groups, ...], outputs first whatever the class. A
split shortcut has two channel ranges (``splits`` = (0, C_h, C)), each with quantizers of its own; an ordinary layer has
one, (0, C).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from ptq_tdq.errors import ModelError
from ptq_tdq.modules.activation import ActivationQuantizer
from ptq_tdq.modules.delegating import Delegating
from ptq_tdq.modules.weight import WeightQuantizer
from ptq_tdq.records import LayerRecord
from ptq_tdq.rotate import rotated, unrotated

Operation = Callable[[Any, Tensor, Tensor, Tensor | None], Tensor]


def _conv(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y: Tensor = layer._conv_forward(x, weight, bias)
    return y


def _linear(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return functional.linear(x, weight, bias)


def _transposed(operation: Callable[..., Tensor], layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return operation(x, weight, bias, layer.stride, layer.padding, layer.output_padding, layer.groups, layer.dilation)


@dataclass(frozen=True)
class Kind:
    """What is known of a class of layers; the weight of a ``transposed`` one is [C, O / groups, ...]."""

    name: str
    operation: Operation
    channel_dim: int = 1  # of x
    transposed: bool = False

    @property
    def tokens_along(self) -> int | None:
        """The dimension of x that is summed over, if it is a single one."""
        return -1 if self.channel_dim == -1 else None


QUANTIZED_LAYERS: dict[type[nn.Module], Kind] = {
    nn.Conv1d: Kind("conv1d", _conv),
    nn.Conv2d: Kind("conv2d", _conv),
    nn.Conv3d: Kind("conv3d", _conv),
    nn.ConvTranspose1d: Kind("conv_transpose1d", partial(_transposed, functional.conv_transpose1d), transposed=True),
    nn.ConvTranspose2d: Kind("conv_transpose2d", partial(_transposed, functional.conv_transpose2d), transposed=True),
    nn.ConvTranspose3d: Kind("conv_transpose3d", partial(_transposed, functional.conv_transpose3d), transposed=True),
    nn.Linear: Kind("linear", _linear, channel_dim=-1),
}


def find_kind(layer: nn.Module) -> Kind | None:
    """The kind of a layer, or None for a module that is not quantized as one."""
    return next((kind for cls, kind in QUANTIZED_LAYERS.items() if isinstance(layer, cls)), None)


def layer_kind(layer: nn.Module) -> str | None:
    """The name of a layer's kind ("conv2d", "linear", ...), or None for a module that is not quantized as one."""
    kind = find_kind(layer)
    return kind.name if kind else None


def layer_operation(layer: nn.Module, x: Tensor) -> Tensor:
    """What a layer of this kind computes from its weight and bias; a subclass may do something else in its forward."""
    kind = find_kind(layer)
    assert kind is not None
    return kind.operation(layer, x, own_weight(layer), own_bias(layer))


def layer_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The tensor that a layer is called with."""
    x = args[0] if args else kwargs.get("input")
    return x if isinstance(x, Tensor) else None


def own_weight(layer: nn.Module) -> Tensor:
    """The weight in the layer's own form."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight


def own_bias(layer: nn.Module) -> Tensor | None:
    """The bias [O], or None."""
    bias = layer.bias
    assert bias is None or isinstance(bias, Tensor)
    return bias


def weight_groups(layer: nn.Module) -> int:
    """Groups of a convolution; 1 for a linear layer."""
    groups: int = getattr(layer, "groups", 1)
    return groups


def outputs_first(layer: nn.Module, weight: Tensor) -> Tensor:
    """A weight of ``layer`` as [O, C / groups, ...]; of this form again it gives the layer's own."""
    kind = find_kind(layer)
    if kind is None or not kind.transposed:
        return weight
    rows: Tensor = weight.unflatten(0, (weight_groups(layer), -1)).transpose(1, 2).flatten(0, 1)
    return rows


def multiply_accumulates(layer: nn.Module, x: Tensor, output: Tensor) -> int:
    """Multiply-accumulates of one layer for the given input and output."""
    kind, each = find_kind(layer), own_weight(layer)[:1].numel()
    assert kind is not None
    return (x if kind.transposed else output).numel() * each


class QuantLayer(Delegating):
    """A layer whose weight and input pass through quantizers; with both off it is the original, bit for bit.

    ``shift`` [O] is the learned correction of the bias (None without a bias); it counts while the weights' quantizers
    are on, and :meth:`finalize` adds it to the bias. ``divisor`` [C] of an equalized layer is divided out of its input
    and multiplied into its weight.
    """

    _inside = "layer"  # models ask their layers for sizes, strides and the like

    def __init__(self, layer: nn.Module, record: LayerRecord) -> None:
        super().__init__()
        kind = find_kind(layer)
        if kind is None:
            raise TypeError(f"{type(layer).__name__} has no quantized form.")
        self.kind = kind
        assert record.weight_bits is not None
        self.layer, self.record = layer, record
        self.ranges = record.ranges
        self.weights = nn.ModuleList(WeightQuantizer(record.weight_bits) for _ in self.ranges)
        self.inputs = nn.ModuleList(ActivationQuantizer(q, kind.tokens_along) for q in record.inputs)
        self.weights_enabled = False
        # float32, since what it learns is less than half precision can hold; a buffer, since a model's dtype is that
        # of its parameters
        self.shift: Tensor | None
        if self.bias is None:
            self.shift = None
        else:
            self.register_buffer("shift", torch.zeros_like(self.bias, dtype=torch.float32), persistent=False)
        self._rotated: Tensor | None = None
        self._known: Tensor | None = None  # what the codes stand for, once it was asked for
        self.finished = False

    @property
    def weight(self) -> Tensor:
        """The weight [O, C / groups, ...] that meets the input's codes; that of the original until ``finalize``.

        Of a finished layer it is what the layer does with its input, for a LoRA's norms and whoever else reads it.
        """
        own = own_weight(self.layer)
        if self.finished and (self.record.rotated or self.divisor is not None):
            meets = own.float() if self.divisor is None else own.float() / self.divisor
            return (unrotated(meets) if self.record.rotated else meets).to(own.dtype)
        if self.finished or not self.record.rotated:
            return outputs_first(self.layer, own)
        if self._rotated is None:
            self._rotated = rotated(own.float()).to(own.dtype)
        return self._rotated

    @property
    def divisor(self) -> Tensor | None:
        """[C], or None. What is None is no buffer: those who move buffers to and fro move each."""
        return self._buffers.get("divisor")

    @divisor.setter
    def divisor(self, divisor: Tensor | None) -> None:
        if divisor is not None:
            self._buffers["divisor"] = divisor
            self._non_persistent_buffers_set.add("divisor")

    @property
    def bias(self) -> Tensor | None:
        """The layer's own bias [O], or None."""
        return own_bias(self.layer)

    @property
    def mixable(self) -> bool:
        """Whether input channels may be rotated or divided by factors: a linear layer whose input has an interval."""
        return self.kind.channel_dim == -1 and len(self.inputs) == 1

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move with the model but keep what is beside the weight in float32."""
        kept = {name: value for name, value in self._buffers.items() if value is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._buffers |= {name: value.to(fn(value).device) for name, value in kept.items()}
        return self

    def equalize(self, divisor: Tensor) -> None:
        """Divide the input's channels by powers of two [C], and multiply the weight's: the output keeps its digits."""
        with torch.no_grad():
            weight = own_weight(self.layer)
            self.layer.weight = nn.Parameter(weight * divisor.to(weight.dtype), requires_grad=False)
        self.divisor = divisor

    def activation_quantizers(self) -> list[ActivationQuantizer]:
        return [q for q in self.inputs if isinstance(q, ActivationQuantizer)]

    def weight_quantizers(self) -> list[WeightQuantizer]:
        return [w for w in self.weights if isinstance(w, WeightQuantizer)]

    def part(self, index: int) -> Tensor:
        """Channel range ``index`` of the original weight, float32."""
        lo, hi = self.ranges[index]
        return self.weight[:, lo:hi].float()

    def assign(self, index: int, codes: Tensor, scale: Tensor, zero_point: Tensor) -> None:
        """Final codes of one channel range."""
        device = own_weight(self.layer).device
        self.weight_quantizers()[index].assign(codes.to(device), scale.to(device), zero_point.to(device))
        self._known, self.finished = None, False

    def quantized_weight(self) -> Tensor:
        """The weight of all ranges in the layer's own form: soft while rounding is learned, else that of the codes."""
        if self.finished:
            return own_weight(self.layer)
        quantizers = self.weight_quantizers()
        learned = any(w.rounding is not None for w in quantizers)
        if self._known is None or learned:
            parts = [w.rounding.soft_weight() if w.rounding else w.dequantized() for w in quantizers]
            weight = outputs_first(self.layer, torch.cat(parts, dim=1) if len(parts) > 1 else parts[0])
            if learned:
                return weight
            self._known = weight
        return self._known

    def stands_for_codes(self, weight: Tensor) -> bool:
        """Whether ``weight``, in the layer's own form, is what the codes stand for, to half a step of each.

        That is not asked of a weight in 8 bits, or on no device, where others keep it for the time being.
        """
        if weight.dtype.itemsize == 1 or weight.is_meta:
            return True
        weight = outputs_first(self.layer, weight)
        quantizers = zip(self.weight_quantizers(), self.ranges, strict=True)
        return all(quantizer.holds(weight[:, lo:hi]) for quantizer, (lo, hi) in quantizers)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        """Raises :class:`ModelError` for the weight of another model, whose codes and intervals are not there."""
        weight = state_dict.get(f"{prefix}{self._inside}.weight")
        alike = weight is not None and weight.shape == own_weight(self.layer).shape  # else torch says so
        if self.finished and alike and not self.stands_for_codes(weight):
            raise ModelError(
                f"The state dict has another weight of {self.record.name}, and no codes and intervals for it; load the "
                "artifact of that model."
            )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def forget(self) -> None:
        """Drop what follows from the codes and the original; it is computed again where it is asked for."""
        self._known, self._rotated = None, None

    def finalize(self) -> None:
        """Replace the original weight by the quantized one, and the bias by the corrected one."""
        with torch.no_grad():
            weight = self.quantized_weight().to(own_weight(self.layer).dtype)
            self.layer.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
            if self.bias is not None and self.shift is not None:
                bias = (self.bias + self.shift).to(self.bias.dtype)
                self.layer.bias = nn.Parameter(bias, requires_grad=False)
                self.shift.zero_()
        self._known, self._rotated, self.finished = None, None, True

    def quantized_input(self, x: Tensor) -> Tensor:
        """The input behind its quantizers: one for each channel range, none where only the weight is quantized."""
        if self.record.rotated:
            x = rotated(x.float()).to(x.dtype)
        if self.divisor is not None:
            x = x / self.divisor.to(x.dtype)
        if len(self.inputs) == 1:
            y: Tensor = self.inputs[0](x)
            return y
        if not self.inputs:
            return x
        sizes = [hi - lo for lo, hi in self.ranges]
        parts = x.split(sizes, self.kind.channel_dim)
        return torch.cat([q(p) for q, p in zip(self.inputs, parts, strict=True)], self.kind.channel_dim)

    def _at_work(self) -> bool:
        """Whether anything is quantized or watched."""
        return self.weights_enabled or any(q.enabled or q.observer for q in self.activation_quantizers())

    def forward(self, input: Tensor) -> Tensor:
        if self.record.rotated and not self.finished and not self._at_work():  # the original, bit for bit
            return self.kind.operation(self.layer, input, own_weight(self.layer), self.bias)
        x = self.quantized_input(input)
        stored = own_weight(self.layer).dtype
        if self.finished and (x.dtype == stored or stored.itemsize == 1):
            y: Tensor = self.layer(x)  # called, so that what moves its weight to and fro, or casts it, knows
            return y
        if not self.weights_enabled:
            weight = self.weight if self.record.rotated and not self.finished else own_weight(self.layer)
            return self.kind.operation(self.layer, x, weight, self.bias)
        bias = None if self.bias is None or self.shift is None else (self.bias + self.shift).to(x.dtype)
        return self.kind.operation(self.layer, x, self.quantized_weight().to(x.dtype), bias)
