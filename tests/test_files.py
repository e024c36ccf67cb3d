"""Only regular files of a fair size are read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ptq_tdq.files import read_file, reason


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


@pytest.mark.parametrize(("name", "said"), [("a\0b", "null"), ("a" * 300, "too long"), ("absent", "No such file")])
def test_a_name_without_a_file_says_why(name: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(OSError) as error:
        read_file(tmp_path / name)
    assert said in reason(error.value)
