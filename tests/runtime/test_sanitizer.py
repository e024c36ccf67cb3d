"""The kernels under an address and undefined-behaviour sanitizer: the project's own build, with three more flags."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=all -O1"  # -O3 takes minutes with it
OUT_OF_BOUNDS = """
import ctypes, torch
from ptq_tdq.runtime.native import Frame, open_library
library = open_library()
assert not isinstance(library, str), library
library.quantize.argtypes = [ctypes.c_void_p] * 6
x, scale, zero_point = torch.zeros(1, 8, 4, 4), torch.ones(1), torch.zeros(1, dtype=torch.int32)
for rows in (4, 5):  # of an image of 4 rows
    out = torch.zeros(1, 8, rows, 4, dtype=torch.uint8)
    frame = Frame(1, rows, 4, 8, 8, 0, 8, 0, 0, 0, 0, 1, 0, 0, 0, None, 255)
    library.quantize(ctypes.addressof(frame), x.data_ptr(), None, *(t.data_ptr() for t in (scale, zero_point, out)))
    print(rows, flush=True)
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Python under the sanitizer's runtime; libstdc++ comes with it, which must be there before torch throws."""
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("there is no gcc, whose sanitizer this is")
    libraries = []
    for name in ("libasan.so", "libubsan.so", "libstdc++.so.6"):
        found = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
        libraries.append(found.stdout.strip())
        if not Path(libraries[-1]).is_absolute():
            pytest.skip(f"this gcc has no {name}")
    folder = tmp_path_factory.mktemp("sanitized")
    script = folder / "cc"  # the last of several -O counts
    script.write_text(f'#!/bin/sh\nexec {compiler} "$@" {FLAGS}\n')
    script.chmod(0o755)
    return {
        **os.environ,
        "CC": str(script),
        "PTQ_TDQ_CACHE": str(folder / "cache"),
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python leaves its own at the end
        "OMP_NUM_THREADS": "1",
    }


def run(environment: dict[str, str], *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *args]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)


def test_the_sanitizer_reports_a_row_too_many(environment: dict[str, str]) -> None:
    wrong = run(environment, "-c", OUT_OF_BOUNDS)
    assert wrong.stdout == "4\n"
    assert wrong.returncode != 0 and "heap-buffer-overflow" in wrong.stderr


def test_the_kernels_stay_inside_their_memory(environment: dict[str, str]) -> None:
    """Alone, and as the layers and blocks of models call them."""
    files = [
        str(HERE / f"test_{name}.py")
        for name in ("kernels", "products", "attention", "layers", "blocks", "passes", "token_blocks", "image_blocks")
    ]
    files.append(str(HERE.parent / "native" / "test_affine.py"))
    chosen = (
        "(native or test_sizes_of or test_layers or test_blocks or test_passes or test_norms or test_masks or "
        "(test_forms and W4A8)) and not without_native and not at_run_time and not half_precision"
    )
    result = run(environment, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, "-k", chosen, "-rs")
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert " passed" in result.stdout and "no native kernels" not in result.stdout
