"""Only regular files of a fair size are read."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save

from ptq_tdq import files
from ptq_tdq.files import check_tensors, holding, read_file, read_image, reason, size_text


@pytest.mark.parametrize(
    ("count", "text"),
    [(999, "999 bytes"), (1000, "0.977 KiB"), (1023 << 10, "0.999 MiB"), (5 << 20, "5 MiB"), (3 << 42, "12,288.0 GiB")],
)
def test_sizes_are_read_by_people(count: int, text: str) -> None:
    assert size_text(count) == text


def test_a_file_is_read_up_to_the_limit_and_not_beyond(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert read_file(path) == read_file(path, 5) == b"12345"
    with pytest.raises(OSError) as error:
        read_file(path, 4)
    assert reason(error.value) == "it has more than 4 bytes"


def test_a_large_file_takes_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(OSError):
        read_file(path, 1 << 20)


@pytest.mark.parametrize("name", ["pipe", "/dev/zero", "."])
def test_what_may_never_end_is_not_opened(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError) as error:
        read_file(tmp_path / name)
    assert reason(error.value) == "it is not a regular file"


@pytest.mark.parametrize(("other", "said"), [(os.mkfifo, "not a regular file"), (Path.touch, "")], ids=["pipe", "file"])
def test_what_takes_its_place_is_looked_at_again(
    other: Callable[[Path], None], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"12345")

    def check_and_exchange(path: Path, most: int | None) -> None:
        path.unlink()
        other(path)

    monkeypatch.setattr(files, "check_file", check_and_exchange)
    if said:
        with pytest.raises(OSError) as error:
            read_file(path, 5)
        assert said in reason(error.value)
    else:
        assert read_file(path, 5) == b""


@pytest.mark.parametrize(("name", "said"), [("a\0b", "null"), ("a" * 300, "too long"), ("absent", "No such file")])
def test_a_name_without_a_file_says_why(name: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(OSError) as error:
        read_file(tmp_path / name)
    assert said in reason(error.value)


def test_tensors_are_as_many_as_their_header_says(tmp_path: Path) -> None:
    path, data = tmp_path / "tensors", save({"a": torch.ones(3), "b": torch.zeros(2)}, metadata={"c": "d"})
    path.write_bytes(data)
    check_tensors(path, len(data))
    path.write_bytes(save({}))
    check_tensors(path)
    for altered in (data + b"x", data[:-1], data[:9], data[:3], b"", (2**63).to_bytes(8, "little") + data[8:]):
        path.write_bytes(altered)
        with pytest.raises(OSError):
            check_tensors(path)


@pytest.mark.parametrize(
    "header", [b"[]", b"{", b'{"a": 1}', b'{"a": {}}', b'{"a": {"data_offsets": [1]}}', b"[" * 10_000]
)
def test_another_header_is_none_of_tensors(header: bytes, tmp_path: Path) -> None:
    (tmp_path / "tensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(OSError) as error:
        check_tensors(tmp_path / "tensors")
    assert reason(error.value) == "it has no header of tensors"


def test_large_files_of_tensors_are_refused_by_their_headers(tmp_path: Path) -> None:
    data = save({"a": torch.ones(3)})
    for start, most in ((b"", None), (data, None), (data.replace(b"12", b"9" * 9), 1 << 20)):
        with (tmp_path / "sparse").open("wb") as file:
            file.write(start)
            file.truncate(3 << 30)
        with pytest.raises(OSError):
            check_tensors(tmp_path / "sparse", most)


def test_a_file_is_held_by_one_until_it_is_let_go_or_killed(tmp_path: Path) -> None:
    with holding(tmp_path) as first, holding(tmp_path) as second:
        assert (first, second) == (True, False)
    program = "import sys; from pathlib import Path; from ptq_tdq.files import holding\n"
    program += "with holding(Path(sys.argv[1])) as held:\n print(held, flush=True)\n input()"
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "True\n"
        with holding(tmp_path) as held:
            assert held is False
        other.kill()
    with holding(tmp_path) as held:
        assert held is True


def test_a_large_image_is_read_without_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    Image.new("RGB", (30, 5)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert read_image(tmp_path / "a.png").size == (30, 5) and not recwarn.list
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 70)
    with pytest.raises(OSError, match="exceeds limit of 140 pixels"):
        read_image(tmp_path / "a.png")
