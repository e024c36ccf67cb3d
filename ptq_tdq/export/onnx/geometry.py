"""What the graph needs to know about a layer: where its channels are, its padding, the shape of its output."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ptq_tdq.errors import ModelError
from ptq_tdq.modules import layer_kind


def is_linear(module: nn.Module) -> bool:
    """Whether channels are the last axis."""
    return layer_kind(module) == "linear"


def is_dense(module: nn.Module) -> bool:
    """Whether a convolution's patches are rows of one matrix product: two spatial axes, one group, a wide kernel."""
    return isinstance(module, nn.Conv2d) and module.groups == 1 and any(size > 1 for size in module.kernel_size)


def require_one_group(module: nn.Module, weight: str) -> None:
    """Raise :class:`ModelError` for a grouped convolution, whose outputs an output channel of ones would not suit."""
    if isinstance(module, nn.Conv1d | nn.Conv2d) and module.groups > 1:
        raise ModelError(
            f"'{weight}' is of a grouped convolution and has affine 8-bit codes, which integer kernels do not take; "
            'calibrate with weight_symmetric = "8-bit" or export with --runtime portable.'
        )


def conv_attributes(module: nn.Module, pads: bool = True) -> dict[str, Any]:
    """The attributes of Conv and ConvInteger."""
    assert isinstance(module, nn.Conv1d | nn.Conv2d)
    pad = padding(module) if pads else [0] * len(module.stride)
    return {
        "strides": list(module.stride),
        "pads": [*pad, *pad],
        "dilations": list(module.dilation),
        "group": module.groups,
    }


def padding(module: nn.Module) -> list[int]:
    """Zeros in front of and behind each spatial axis; raises :class:`ModelError` for any other kind of padding."""
    assert isinstance(module, nn.Conv1d | nn.Conv2d)
    if module.padding_mode != "zeros" or isinstance(module.padding, str):
        raise ModelError(
            f"A convolution pads its input in a way that is not exported ({module.padding_mode}, {module.padding}); "
            "keep it in float with a skip pattern or pad with a number of zeros."
        )
    return list(module.padding)


def output_shape(layer: nn.Module, x: Tensor) -> list[int | torch.SymInt]:
    """The shape of ``layer(x)``, in terms as simple as the exporter's symbolic algebra is slow."""
    if isinstance(layer, nn.Linear):
        return [*x.shape[:-1], layer.out_features]
    assert isinstance(layer, nn.Conv1d | nn.Conv2d)
    sizes: list[int | torch.SymInt] = []
    for size, kernel, stride, pad, dilation in zip(
        x.shape[2:], layer.kernel_size, layer.stride, padding(layer), layer.dilation, strict=True
    ):
        change = 2 * pad - dilation * (kernel - 1)
        same = stride == 1 and change == 0
        sizes.append(size if same else (size + change - 1) // stride + 1)
    return [x.shape[0], layer.out_channels, *sizes]
