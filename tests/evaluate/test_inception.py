"""Inception metrics: what is said where torch-fidelity or its weights are missing, and the images that they take."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from ptq_tdq.errors import MissingExtraError, UsageError
from ptq_tdq.evaluate.inception import (
    BATCH,
    SPATIAL_CHANNELS,
    against_data,
    describe,
    find_real,
    load_inception,
    read_real,
    to_uint8,
)


@pytest.mark.skipif(find_spec("torch_fidelity") is not None, reason="torch-fidelity is installed")
def test_without_the_package_one_sentence_says_what_to_install() -> None:
    with pytest.raises(MissingExtraError, match=r"torch-fidelity .*pip install 'ptq-tdq\[fidelity\]'"):
        load_inception()


@pytest.mark.skipif(find_spec("torch_fidelity") is None, reason="torch-fidelity is not installed")
def test_without_the_weights_one_sentence_says_where_they_belong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(MissingExtraError, match=r"weights are missing; put https://.*\.pth into .*checkpoints"):
        load_inception()


def test_images_of_a_folder_and_of_its_folders_are_read_in_order(tmp_path: Path) -> None:
    for i, name in enumerate(("b/1.png", "a.png", "b/0.png")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 6), (i, 0, 9)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    images = read_real(find_real(tmp_path), (6, 4))
    assert images.shape == (3, 3, 6, 4) and images.dtype == torch.uint8
    assert images[:, 0, 0, 0].tolist() == [1, 2, 0] and (images[:, 2] == 9).all()


def test_a_folder_that_cannot_be_compared_with_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="at least 2 images"):
        find_real(tmp_path / "absent")
    Image.new("RGB", (4, 4)).save(tmp_path / "0.png")
    Image.new("RGB", (8, 4)).save(tmp_path / "1.png")
    with pytest.raises(UsageError, match=r"1\.png' is 8x4, the samples are 4x4"):
        read_real(find_real(tmp_path), (4, 4))
    (tmp_path / "1.png").write_bytes(b"no image")
    with pytest.raises(UsageError, match=r"1\.png' cannot be read"):
        read_real(find_real(tmp_path), (4, 4))


def test_images_of_16_bits_keep_their_range(tmp_path: Path) -> None:
    ramp = np.array([[0, 0x4000, 0x8000, 0xFFFF]], dtype=np.uint16)
    for name in ("0.png", "1.png"):
        Image.fromarray(ramp).save(tmp_path / name)
    images = read_real(find_real(tmp_path), (1, 4))
    assert images.shape == (2, 3, 1, 4) and images[0, 0, 0].tolist() == [0, 63, 127, 255]


def test_an_image_that_would_be_huge_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("0.png", "1.png"):
        Image.new("RGB", (40, 40)).save(tmp_path / name)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UsageError, match=r"0\.png' cannot be read .*decompression bomb"):
        read_real(find_real(tmp_path), (40, 40))


def test_pixels_are_rounded_and_grey_becomes_three_channels() -> None:
    images = torch.tensor([-1.0, 0.0, 1.0, 2.0]).view(4, 1, 1, 1)
    assert to_uint8(images)[:, :, 0, 0].tolist() == [[v] * 3 for v in (0, 128, 255, 255)]


class Network(nn.Module):
    """The form of torch-fidelity's network, small: pooled features, logits, a branch of 9 channels at 2 x 2 places."""

    def __init__(self) -> None:
        super().__init__()
        self.Mixed_6d = nn.Module()
        self.Mixed_6d.branch1x1 = nn.Conv2d(3, 9, 2, stride=2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        values = self.Mixed_6d.branch1x1(x.float() / 255)
        return values.mean((2, 3)), values.flatten(1)[:, :5]


def test_each_distance_reads_its_own_features_of_all_batches() -> None:
    torch.manual_seed(0)
    network, count = Network(), BATCH + 7
    images = torch.rand(count, 3, 4, 4) * 2 - 1
    real = describe(network, to_uint8(images))
    assert [part.shape for part in real] == [(count, 9), (count, SPATIAL_CHANNELS * 4), (count, 5)]
    with torch.no_grad():
        whole = network.Mixed_6d.branch1x1(to_uint8(images).float() / 255)
    torch.testing.assert_close(real[1], whole[:, :SPATIAL_CHANNELS].flatten(1))
    same = against_data(network, images, real)
    assert same["fid"] == pytest.approx(0, abs=1e-5) and same["sfid"] == pytest.approx(0, abs=1e-4)
    assert 1 <= same["inception_score"] <= 5
    other = against_data(network, -images.abs(), real)
    assert other["fid"] > 0.01 and other["sfid"] > 0.01
