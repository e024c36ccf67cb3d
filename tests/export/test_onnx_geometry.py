"""Facts about layers that the exported graph relies on."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ptq_tdq.export.onnx.geometry import is_dense, is_grouped, output_shape, padding, unpadded

LAYERS = {
    "linear": (nn.Linear(4, 7), (2, 5, 4)),
    "same": (nn.Conv2d(4, 7, 3, padding=1), (2, 4, 9, 6)),
    "pointwise": (nn.Conv2d(4, 7, 1), (2, 4, 9, 6)),
    "strided": (nn.Conv2d(4, 7, 3, stride=2, padding=1), (2, 4, 9, 6)),
    "unpadded": (nn.Conv2d(4, 7, 3, stride=2), (2, 4, 9, 6)),
    "dilated": (nn.Conv2d(4, 7, (3, 5), dilation=(1, 2), padding=(0, 3)), (2, 4, 9, 6)),
    "1-d": (nn.Conv1d(4, 7, 3, stride=3, padding=2), (2, 4, 9)),
    "3-d": (nn.Conv3d(4, 7, (1, 2, 3), stride=(1, 2, 1), padding=(0, 1, 2)), (2, 4, 3, 9, 6)),
    "transposed": (nn.ConvTranspose2d(4, 7, 3, stride=2, padding=1, output_padding=1), (2, 4, 9, 6)),
}
ODDLY_PADDED = {
    "reflected": nn.Conv2d(4, 7, 3, padding=1, padding_mode="reflect"),
    "circular": nn.Conv1d(4, 7, 5, padding=2, padding_mode="circular"),
    "even kernel": nn.Conv2d(4, 7, (2, 4), padding="same"),
    "none": nn.Conv2d(4, 7, 3, padding="valid"),
}


@pytest.mark.parametrize("name", LAYERS)
def test_output_shapes_are_those_of_torch(name: str) -> None:
    layer, shape = LAYERS[name]
    x = torch.zeros(shape)
    assert tuple(output_shape(layer, x)) == tuple(layer(x).shape)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", ODDLY_PADDED)
def test_any_padding_is_zeros_behind_a_step_of_its_own(name: str) -> None:
    layer = ODDLY_PADDED[name]
    x = torch.randn(2, 4, *[9] * len(layer.kernel_size), generator=torch.Generator().manual_seed(0))
    plain, pad = unpadded(layer)
    assert (plain.padding_mode, padding(plain)) == ("zeros", [0] * len(layer.kernel_size))
    torch.testing.assert_close(plain(pad(x)), layer(x), rtol=0, atol=0)
    assert tuple(output_shape(plain, pad(x))) == tuple(layer(x).shape)


def test_numbers_of_zeros_stay() -> None:
    layer = nn.Conv2d(4, 4, 3, padding=(1, 2))
    assert unpadded(layer)[0] is layer
    assert padding(layer) == [1, 2]


def test_groups() -> None:
    assert is_dense(nn.Conv2d(4, 4, 3))
    assert not is_dense(nn.Conv2d(4, 4, 3, groups=2))
    assert not is_dense(nn.ConvTranspose2d(4, 4, 3))
    assert is_grouped(nn.Conv2d(4, 4, 3, groups=2))
    assert not is_grouped(nn.Linear(4, 4))
