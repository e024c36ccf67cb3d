"""Facts about layers that the exported graph relies on."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ptq_tdq.errors import ModelError
from ptq_tdq.export.onnx.geometry import is_dense, output_shape, padding, require_one_group

LAYERS = {
    "linear": (nn.Linear(4, 7), (2, 5, 4)),
    "same": (nn.Conv2d(4, 7, 3, padding=1), (2, 4, 9, 6)),
    "pointwise": (nn.Conv2d(4, 7, 1), (2, 4, 9, 6)),
    "strided": (nn.Conv2d(4, 7, 3, stride=2, padding=1), (2, 4, 9, 6)),
    "unpadded": (nn.Conv2d(4, 7, 3, stride=2), (2, 4, 9, 6)),
    "dilated": (nn.Conv2d(4, 7, (3, 5), dilation=(1, 2), padding=(0, 3)), (2, 4, 9, 6)),
    "1-d": (nn.Conv1d(4, 7, 3, stride=3, padding=2), (2, 4, 9)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_output_shapes_are_those_of_torch(name: str) -> None:
    layer, shape = LAYERS[name]
    x = torch.zeros(shape)
    assert tuple(output_shape(layer, x)) == tuple(layer(x).shape)


def test_only_zeros_can_pad() -> None:
    assert padding(nn.Conv2d(4, 4, 3, padding=(1, 2))) == [1, 2]
    for other in (nn.Conv2d(4, 4, 3, padding="same"), nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")):
        with pytest.raises(ModelError, match="pads its input in a way that is not exported"):
            padding(other)


def test_groups() -> None:
    assert is_dense(nn.Conv2d(4, 4, 3))
    assert not is_dense(nn.Conv2d(4, 4, 3, groups=2))
    require_one_group(nn.Conv2d(4, 4, 3), "conv.weight")
    with pytest.raises(ModelError, match=r"'conv.weight' is of a grouped convolution .* --runtime portable"):
        require_one_group(nn.Conv2d(4, 4, 3, groups=2), "conv.weight")
