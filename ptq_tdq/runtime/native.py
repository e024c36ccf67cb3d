"""Builds ``native.c`` on demand with the system's C compiler and calls it; without one, kernels.py does the work.

The library is kept in the user's cache, under a name that follows from its source, the flags and the processor. It
shares torch's OpenMP threads, since it is linked without a library of its own.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import lru_cache
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor

from ptq_tdq.artifacts.atomic import write_atomic
from ptq_tdq.cache import cache_folder
from ptq_tdq.errors import OutputError
from ptq_tdq.runtime.kernels import Grid, Norm, Quantize

FLAGS = ("-std=gnu11", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC")
SWITCH = "PTQ_TDQ_NATIVE"  # 0 = never build or use native code


class _Frame(ctypes.Structure):
    """``Frame`` of native.c."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "height", "width", "channels", "stride", "first", "pitch")),
        *((name, ctypes.c_int64) for name in ("top", "left", "bottom", "right", "up", "each")),
        ("qmax", ctypes.c_float),
    ]


def open_library(march: str = "native") -> ctypes.CDLL | str:
    """The library built for a processor as compilers name it, or a clause that says why there is none."""
    if os.environ.get(SWITCH) == "0":
        return f"{SWITCH}=0"
    try:
        return _library(march)
    except (OSError, subprocess.CalledProcessError, OutputError) as error:
        detail = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        return f"no native kernels: {detail[0] if detail else type(error).__name__}"


def native_quantize(library: ctypes.CDLL) -> Quantize:
    """:class:`~ptq_tdq.runtime.kernels.Quantize` on the built library."""
    frames: dict[tuple[object, ...], _Frame] = {}
    plain, fused = library.quantize, library.norm_quantize
    plain.restype, fused.restype = None, ctypes.c_int
    plain.argtypes = [ctypes.c_void_p] * 5
    fused.argtypes = [*[ctypes.c_void_p] * 5, ctypes.c_int64, ctypes.c_float, ctypes.c_int, *[ctypes.c_void_p] * 3]

    def quantize(
        x: Tensor, grid: Grid, scale: Tensor, zero_point: Tensor, norm: Norm | None, shift: Tensor | None
    ) -> Tensor:
        if x.dtype != torch.float32 or not x.is_contiguous(memory_format=torch.channels_last):
            x = x.float().contiguous(memory_format=torch.channels_last)
        batch, stride, height, width = x.shape
        (lo, hi), (top, left, bottom, right), up = grid.channels, grid.padding, grid.up
        each = int(scale.numel() > 1)
        key = (batch, stride, height, width, grid, each)
        frame = frames.get(key)
        if frame is None:
            sizes = (batch, height, width, hi - lo, stride, lo, grid.pitch, *grid.padding, up, each, 2**grid.bits - 1)
            frame = frames[key] = _Frame(*sizes)
        shape = (batch, grid.pitch, top + height * up + bottom, left + width * up + right)
        out = torch.empty(shape, dtype=torch.uint8, memory_format=torch.channels_last)
        where = scale.data_ptr(), zero_point.data_ptr(), out.data_ptr()
        if norm is None:
            plain(ctypes.addressof(frame), x.data_ptr(), *where)
            return out
        shift = None if shift is None else shift.float().contiguous()
        moved = None if shift is None else shift.data_ptr()
        weights = norm.weight.data_ptr(), norm.bias.data_ptr(), norm.groups, norm.epsilon, norm.silu
        if fused(ctypes.addressof(frame), x.data_ptr(), moved, *weights, *where):
            raise MemoryError
        return out

    return quantize


@lru_cache
def _library(march: str) -> ctypes.CDLL:
    """The built library; raises OSError or CalledProcessError where it cannot be built."""
    compiler = os.environ.get("CC") or next(filter(shutil.which, ("gcc", "clang", "cc")), None)
    if compiler is None:
        raise OSError("there is no C compiler")
    source = files("ptq_tdq.runtime").joinpath("native.c").read_bytes()
    flags = [*FLAGS, f"-march={march}"]
    identity = [source, compiler.encode(), " ".join(flags).encode(), _processor()]
    name = hashlib.sha256(b"\0".join(identity)).hexdigest()[:16]
    path = cache_folder() / f"native-{name}.so"
    if not path.exists():
        write_atomic(path, _build([compiler, *flags], source))
    return ctypes.CDLL(str(path))


def _processor() -> bytes:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "".join(sorted({line for line in lines if line.startswith(("model name", "flags"))})).encode()
    except OSError:
        return platform.processor().encode()


def _build(compile_command: list[str], source: bytes) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        # compiled with OpenMP, linked without its library: torch has loaded one, and two would fight for the cores
        compile_, object_, out = Path(folder, "native.c"), Path(folder, "native.o"), Path(folder, "native.so")
        compile_.write_bytes(source)
        for command in (
            [*compile_command, "-c", str(compile_), "-o", str(object_)],
            [compile_command[0], "-shared", str(object_), "-o", str(out), "-lm"],
        ):
            subprocess.run(command, check=True, capture_output=True, text=True)
        return out.read_bytes()
