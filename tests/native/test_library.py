"""A library on its way from the compiler through the cache into the process."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ptq_tdq.native import library
from ptq_tdq.native.library import load_c


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, on a machine with a compiler."""
    try:
        library.c_compiler()
    except OSError as error:
        pytest.skip(str(error))
    monkeypatch.setenv("PTQ_TDQ_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def reopened() -> Any:
    library._library.cache_clear()
    try:
        return load_c("ptq_tdq.native", "affine.c")
    finally:
        library._library.cache_clear()


def test_it_is_kept_where_only_its_user_may_write(cache: Path) -> None:
    assert reopened().fake_quantize
    (file,) = (cache / "native").iterdir()
    assert stat.S_IMODE((cache / "native").stat().st_mode) == 0o700
    assert not stat.S_IMODE(file.stat().st_mode) & 0o022
    before = file.stat().st_mtime_ns
    assert reopened().fake_quantize
    assert file.stat().st_mtime_ns == before  # not built again


def planted(file: Path) -> None:
    file.write_bytes(b"somebody else's program")


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def altered(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def opened_to_others(file: Path) -> None:
    file.chmod(0o666)


def linked(file: Path) -> None:
    elsewhere = file.parents[2] / "elsewhere.so"
    file.rename(elsewhere)
    file.symlink_to(elsewhere)


def of_another_user(file: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can give a file away")
    os.chown(file, 12345, 12345)


DAMAGE = [planted, truncated, altered, emptied, opened_to_others, linked, of_another_user]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_file_that_is_not_surely_ours_is_built_again(cache: Path, damage: Callable[[Path], None]) -> None:
    reopened()
    (file,) = (cache / "native").iterdir()
    whole = file.read_bytes()
    damage(file)
    assert reopened().fake_quantize
    assert file.read_bytes() == whole and not file.is_symlink()
    assert file.stat().st_uid == os.getuid() and not stat.S_IMODE(file.stat().st_mode) & 0o022


def test_a_folder_that_others_may_write_is_not_used(cache: Path) -> None:
    (cache / "native").mkdir(parents=True)
    (cache / "native").chmod(0o777)
    assert reopened().fake_quantize
    assert list((cache / "native").iterdir()) == []


def test_a_linked_folder_is_not_used(cache: Path) -> None:
    (cache / "other").mkdir(parents=True)
    (cache / "native").symlink_to(cache / "other")
    assert reopened().fake_quantize
    assert list((cache / "other").iterdir()) == []


def test_a_cache_that_is_a_file_is_no_obstacle(cache: Path) -> None:
    cache.write_text("a file")
    assert reopened().fake_quantize


@pytest.mark.parametrize("launcher", ["{} -m64", "env {}", "'{}'"])
def test_the_compiler_may_have_flags_or_a_launcher(launcher: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.uname().machine != "x86_64":
        pytest.skip("-m64 is of x86")
    (compiler,) = library.c_compiler()
    monkeypatch.setenv("CC", launcher.format(compiler))
    assert reopened().fake_quantize


@pytest.mark.parametrize(
    ("compiler", "said"),
    [
        ("no-such-compiler", "no-such-compiler"),
        ("false", "returned non-zero exit status 1"),
        ("true", "No such file"),
        ("'unbalanced", "No closing quotation"),
        ("sh -c 'echo out of order >&2; exit 1'", "out of order"),
        ("/", "Permission denied"),
    ],
)
def test_a_compiler_that_fails_leaves_torch_and_says_why(
    compiler: str, said: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", compiler)
    found = reopened()
    assert isinstance(found, str) and found.startswith("no native kernels: ") and said in found
    assert "\n" not in found


def test_a_user_without_a_home_is_no_obstacle(cache: Path) -> None:
    script = (
        "import pathlib\n"
        "def homeless(): raise RuntimeError('Could not determine home directory.')\n"
        "pathlib.Path.home = homeless\n"
        "import torch  # whose OpenMP it shares\n"
        "from ptq_tdq.native.library import load_c; assert load_c('ptq_tdq.native', 'affine.c').fake_quantize"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PTQ_TDQ_CACHE"}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)
