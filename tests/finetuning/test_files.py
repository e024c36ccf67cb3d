"""Images and latents in files: what is read, and what is refused before anything is learned."""

from __future__ import annotations

import io
import os
import struct
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from hostile import small_unet
from PIL import Image

from ptq_tdq import load_model
from ptq_tdq.calib_data import LoadedModel, LoopSampler
from ptq_tdq.errors import CalibrationSetError, ConfigError
from ptq_tdq.finetuning.data import NoisedSamples
from ptq_tdq.finetuning.files import read_data
from ptq_tdq.timeaxis import TimeAxis

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
LABELS = np.arange(12) % 3
LATENTS = np.random.default_rng(1).normal(size=(12, 3, 8, 8)).astype(np.float32)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """A model of 3 channels, 8 x 8 pixels and 3 classes."""
    folder = tmp_path_factory.mktemp("model")
    small_unet().save_pretrained(folder)
    DDIMScheduler().save_pretrained(folder)
    return load_model(str(folder))


def read(path: Path, model: LoadedModel) -> NoisedSamples:
    return read_data(path, model, TimeAxis("timestep"), denoise=True)


def npz(folder: Path, **arrays: Any) -> Path:
    np.savez(folder / "data.npz", **arrays)
    return folder / "data.npz"


def images(folder: Path, classes: int = 3) -> Path:
    for number, (pixels, label) in enumerate(zip(PIXELS, np.arange(12) % classes, strict=True)):
        part = folder / f"class{label}"
        part.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(part / f"{number:02d}.png")
    return folder


def npy(shape: str, content: bytes) -> bytes:
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + content


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in (header, *chunks, (b"IEND", b"")))


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f2", "<f8"])
def test_latents_of_any_floating_type_are_those_of_float32(dtype: str, model: LoadedModel, tmp_path: Path) -> None:
    found = read(npz(tmp_path, latents=LATENTS.astype(dtype), labels=LABELS), model)
    torch.testing.assert_close(found.clean, torch.from_numpy(LATENTS), rtol=1e-3, atol=1e-3)
    assert found.labels is not None and found.labels.tolist() == LABELS.tolist()


@pytest.mark.parametrize(
    ("arrays", "text"),
    [
        ({"latents": np.array(["a"] * 12)}, "'latents.npy' is not of real numbers"),
        ({"latents": LATENTS.astype(complex)}, "'latents.npy' is not of real numbers"),
        ({"images": np.array([{}, 1], dtype=object)}, "'images.npy' is not of real numbers"),
        ({"latents": PIXELS.transpose(0, 3, 1, 2)}, "Latents must be floating-point numbers. Got uint8"),
        ({"latents": LATENTS.astype(np.float64) * 1e300}, "NaN or Inf"),
        ({"images": PIXELS.astype(np.float32)}, r"Images must be uint8 \[N, H, W, 1 or 3\]. Got float32"),
        ({"images": PIXELS, "latents": LATENTS}, "both 'images' and 'latents'; leave one of them out"),
        ({"images": PIXELS, "labels": np.array(["a"] * 12)}, "'labels.npy' is not of real numbers"),
        ({"images": PIXELS, "labels": np.full(12, 0.7)}, "does not hold a class from 0 to 2"),
        ({"images": PIXELS, "labels": np.full(12, np.nan)}, "does not hold a class from 0 to 2"),
        ({"images": PIXELS, "labels": LABELS.reshape(3, 4)}, "does not hold a class from 0 to 2"),
        ({"images": PIXELS, "labels": np.full(12, 2**63, np.uint64)}, "does not hold a class from 0 to 2"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_other_arrays_are_refused(arrays: dict[str, Any], text: str, model: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(CalibrationSetError, match=text):
        read(npz(tmp_path, **{"labels": LABELS, **arrays}), model)


@pytest.mark.parametrize(
    ("member", "text"),
    [
        (npy("(1000000000000, 8, 8, 3)", b"x" * 192), "is not as long as its shape says"),
        (npy("(2, 8, 8, 3)", b"x" * 192), "is not as long as its shape says"),
        (npy("(-1, 8, 8, 3)", b"x" * 192), "is not as long as its shape says"),
        (npy("(200000, 8, 8, 3)", bytes(200_000 * 192)), "more than 100 times as long as in the file"),
        (npy(f"({'-' * 9000}1,)", b""), "cannot be read"),
        (b"neither", "cannot be read"),
    ],
)
def test_no_array_takes_more_than_its_bytes(member: bytes, text: str, model: LoadedModel, tmp_path: Path) -> None:
    with ZipFile(tmp_path / "data.npz", "w", ZIP_DEFLATED) as file:
        file.writestr("images.npy", member)
    with pytest.raises(CalibrationSetError, match=text):
        read(tmp_path / "data.npz", model)


def test_files_that_are_no_npz_are_one_sentence(model: LoadedModel, tmp_path: Path) -> None:
    good = npz(tmp_path, images=PIXELS, labels=LABELS).read_bytes()
    array, packed, locked = io.BytesIO(), bytearray(good), bytearray(good)
    np.save(array, PIXELS)
    directory = good.index(b"PK\x01\x02")
    packed[8], packed[directory + 10] = 99, 99  # a method of compression that nobody knows
    locked[6], locked[directory + 8] = 1, 1  # encrypted
    flipped = good[:300] + bytes([good[300] ^ 255]) + good[301:]
    for data in (b"", b"text", good[: len(good) // 2], flipped, bytes(packed), bytes(locked), array.getvalue()):
        (tmp_path / "data.npz").write_bytes(data)
        with pytest.raises(CalibrationSetError, match=r"cannot be read as an npz file \(.+\); give another"):
            read(tmp_path / "data.npz", model)


def test_an_image_of_16_bits_is_the_same_image(model: LoadedModel, tmp_path: Path) -> None:
    folder = images(tmp_path)
    gray = PIXELS[:3, :, :, 0]
    for number, pixels in enumerate(gray):
        Image.fromarray(pixels.astype(np.uint16) * 257).save(folder / f"class{number}" / "a.png")
    found = read(folder, model)
    assert found.labels is not None
    first = [int((found.labels == label).nonzero()[-1]) for label in range(3)]
    expected = torch.from_numpy(gray).float() / 127.5 - 1
    torch.testing.assert_close(found.clean[first], expected[:, None].expand(-1, 3, -1, -1))


def test_a_model_of_one_channel_takes_grey_images_from_folders_and_files(tmp_path: Path) -> None:
    small_unet(in_channels=1, out_channels=1, num_class_embeds=None).save_pretrained(tmp_path / "model")
    DDIMScheduler().save_pretrained(tmp_path / "model")
    model, grey = load_model(str(tmp_path / "model")), PIXELS[..., 0]
    (tmp_path / "images").mkdir()
    for number, pixels in enumerate(grey):
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number:02d}.png")
    for path in (tmp_path / "images", npz(tmp_path, images=grey)):
        assert torch.equal(read(path, model).clean, torch.from_numpy(grey)[:, None].float() / 127.5 - 1)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"text",
        b"GIF89a" + b"\xff" * 60,
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",  # Pillow would start a program
        png(30_000, 30_000, (b"IDAT", b"")),
        png(8, 8, (b"zTXt", b"a\0\0" + zlib.compress(bytes(10**8))), (b"IDAT", zlib.compress(b"\0xyz" * 99))),
        png(8, 8, (b"IDAT", b"x")),
    ],
)
def test_what_is_no_image_is_one_sentence(content: bytes, model: LoadedModel, tmp_path: Path) -> None:
    (images(tmp_path) / "class0" / "00.png").write_bytes(content)
    with pytest.raises(CalibrationSetError, match=r"'.*00.png' is no image that can be read"):
        read(tmp_path, model)


def test_a_pipe_among_the_images_is_one_sentence(model: LoadedModel, tmp_path: Path) -> None:
    os.mkfifo(images(tmp_path) / "class0" / "pipe.png")
    with pytest.raises(CalibrationSetError, match=r"'.*pipe.png' is no image .* not a regular file"):
        read(tmp_path, model)


def test_sub_folders_are_the_classes(model: LoadedModel, tmp_path: Path) -> None:
    """Hidden ones are not; fewer would be other classes than their names say."""
    (tmp_path / ".cache").mkdir()
    found = read(images(tmp_path), model)
    assert found.labels is not None and found.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    (tmp_path / "class0").rename(tmp_path / ".class0")
    with pytest.raises(CalibrationSetError, match=r"has 3 classes, and '.*' has 2 sub-folders; give it one for each"):
        read(tmp_path, model)


def scheduled(model: LoadedModel, scheduler: Any) -> LoadedModel:
    assert isinstance(model.sampler, LoopSampler)
    return replace(model, sampler=LoopSampler(model.denoiser, scheduler))


def test_another_schedule_is_another_run(model: LoadedModel, tmp_path: Path) -> None:
    """What is learned follows from it, so no run goes on under another."""
    path = npz(tmp_path, images=PIXELS, labels=LABELS)
    schedulers = (
        DDIMScheduler(),
        DDIMScheduler(beta_end=0.03),
        DDIMScheduler(prediction_type="v_prediction"),
        FlowMatchEulerDiscreteScheduler(),
    )
    found = [read(path, scheduled(model, scheduler)).identity for scheduler in schedulers]
    assert len(set(found)) == 4
    assert read(path, scheduled(model, DDIMScheduler())).identity == found[0]


def test_a_scheduler_of_neither_diffusion_nor_flow_matching_is_refused(model: LoadedModel, tmp_path: Path) -> None:
    path = npz(tmp_path, images=PIXELS, labels=LABELS)
    with pytest.raises(ConfigError, match=r"predicts under EDMEulerScheduler \(epsilon\) has no training loss here"):
        read(path, scheduled(model, EDMEulerScheduler()))


@pytest.mark.parametrize("count", [2, 7, 8, 12])
def test_some_samples_only_judge(count: int, model: LoadedModel, tmp_path: Path) -> None:
    data = read(npz(tmp_path, images=PIXELS[:count], labels=LABELS[:count]), model)
    assert data.count == count - 1 and sum(batch.rows for batch in data.judges()) == 1
