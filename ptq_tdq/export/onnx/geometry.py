"""What the graph needs to know about a layer: where its channels are, its padding, the shape of its output."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ptq_tdq.modules.layers import find_kind, weight_groups

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def is_linear(module: nn.Module) -> bool:
    """Whether channels are the last axis."""
    return isinstance(module, nn.Linear)


def is_transposed(module: nn.Module) -> bool:
    """Whether the layer is a transposed convolution, which integer operators do not have."""
    kind = find_kind(module)
    return kind is not None and kind.transposed


def is_dense(module: nn.Module) -> bool:
    """Whether a convolution's patches are rows of one matrix product: two spatial axes, one group."""
    return isinstance(module, nn.Conv2d) and module.groups == 1


def is_grouped(module: nn.Module) -> bool:
    """Whether an output channel of ones would not be the sum over all input channels."""
    return weight_groups(module) > 1


def unpadded(module: nn.Module) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """The layer with zeros as its only padding, and what is to be done to its input first.

    Other kinds of padding (reflected, circular, "same") become a step of their own: they only repeat values of the
    input, so quantizing comes to the same before and behind them.
    """
    if not isinstance(module, CONVS) or (module.padding_mode == "zeros" and not isinstance(module.padding, str)):
        return module, _identity
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    amounts: list[int] = module._reversed_padding_repeated_twice
    plain = copy.copy(module)
    plain.padding_mode, plain.padding = "zeros", (0,) * len(module.kernel_size)
    return plain, lambda x: functional.pad(x, amounts, mode=mode)


def _identity(x: Tensor) -> Tensor:
    return x


def conv_attributes(module: nn.Module) -> dict[str, Any]:
    """The attributes of Conv, ConvInteger and ConvTranspose."""
    assert isinstance(module, (*CONVS, *TRANSPOSED))
    return {
        "strides": list(module.stride),
        "pads": 2 * padding(module),
        "dilations": list(module.dilation),
        "group": module.groups,
        **({"output_padding": list(module.output_padding)} if is_transposed(module) else {}),
    }


def padding(module: nn.Module) -> list[int]:
    """Zeros in front of and behind each spatial axis of an :func:`unpadded` layer."""
    assert isinstance(module, (*CONVS, *TRANSPOSED)) and not isinstance(module.padding, str)
    return list(module.padding)


def output_shape(layer: nn.Module, x: Tensor) -> list[int | torch.SymInt]:
    """The shape of ``layer(x)``, in terms as simple as the exporter's symbolic algebra is slow."""
    if isinstance(layer, nn.Linear):
        return [*x.shape[:-1], layer.out_features]
    assert isinstance(layer, (*CONVS, *TRANSPOSED))
    sizes: list[int | torch.SymInt] = []
    for size, kernel, stride, pad, dilation, more in zip(
        x.shape[2:], layer.kernel_size, layer.stride, padding(layer), layer.dilation, layer.output_padding, strict=True
    ):
        change = 2 * pad - dilation * (kernel - 1)
        if is_transposed(layer):
            sizes.append((size - 1) * stride - change + more + 1)
        else:
            same = stride == 1 and change == 0
            sizes.append(size if same else (size + change - 1) // stride + 1)
    return [x.shape[0], layer.out_channels, *sizes]
