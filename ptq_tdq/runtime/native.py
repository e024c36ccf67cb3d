"""Builds ``native.c`` on demand with the system's C compiler and calls it; without one, kernels.py does the work.

The library is kept in a private folder of the user's cache, under a name that follows from its source, the flags and
the processor. It shares torch's OpenMP threads, since it is linked without a library of its own.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from contextlib import suppress
from functools import lru_cache
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor

from ptq_tdq.artifacts.atomic import write_atomic
from ptq_tdq.cache import cache_folder, private_folder, read_private, with_digest
from ptq_tdq.errors import OutputError
from ptq_tdq.rotate import signs
from ptq_tdq.runtime.address import address, per_sample, untraced
from ptq_tdq.runtime.kernels import (
    ACTIVATIONS,
    NOTHING,
    Activation,
    Before,
    Grid,
    Quantize,
    Rotate,
    WeightOnly,
    reference_weight_only,
)
from ptq_tdq.scheme import QType

FLAGS = ("-std=gnu11", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC")
WIDE = ("-mprefer-vector-width=512",)  # of x86: compilers take half the vectors of Intel's processors by themselves
BUILD_SECONDS = 300  # a compiler that takes longer hangs
FEW_ROWS = 8  # for which weights of integers are made float one by one
SWITCH = "PTQ_TDQ_NATIVE"  # 0 = never build or use native code


class Frame(ctypes.Structure):
    """``Frame`` of native.c."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "height", "width", "channels", "stride", "first", "pitch")),
        *((name, ctypes.c_int64) for name in ("top", "left", "bottom", "right", "up", "each")),
        *((name, ctypes.c_int64) for name in ("activation", "is_gated")),
        ("signs", ctypes.c_void_p),
        ("qmax", ctypes.c_float),
    ]


def open_library(march: str = "native") -> ctypes.CDLL | str:
    """The library built for a processor as compilers name it, or a clause that says why there is none."""
    if os.environ.get(SWITCH) == "0":
        return f"{SWITCH}=0"
    try:
        return _library(march)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        detail = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        return f"no native kernels: {detail[0] if detail else type(error).__name__}"


def native_quantize(library: ctypes.CDLL) -> Quantize:
    """:class:`~ptq_tdq.runtime.kernels.Quantize` on the built library."""
    frames: dict[tuple[object, ...], tuple[Frame, Tensor | None]] = {}
    plain, fused = library.quantize, library.norm_quantize
    plain.restype = fused.restype = ctypes.c_int
    plain.argtypes = [ctypes.c_void_p] * 6
    fused.argtypes = [*[ctypes.c_void_p] * 5, ctypes.c_int64, ctypes.c_float, *[ctypes.c_void_p] * 3]

    @untraced
    def quantize(x: Tensor, grid: Grid, scale: Tensor, zero_point: Tensor, before: Before = NOTHING) -> Tensor:
        if x.dtype != torch.float32 or not x.is_contiguous(memory_format=torch.channels_last):
            x = x.float().contiguous(memory_format=torch.channels_last)
        batch, stride, height, width = x.shape
        lo, (top, left, bottom, right), up = grid.channels[0], grid.padding, grid.up
        grid.check(stride, before)
        *interval, each = per_sample("a quantizer", scale, zero_point, batch)
        key = (batch, stride, height, width, grid, each, before.activation, before.rotate is not None)
        found = frames.get(key)
        if found is None:
            found = frames[key] = frame_of(*key)
        frame = ctypes.addressof(found[0])
        shape = (batch, grid.pitch, top + height * up + bottom, left + width * up + right)
        out = torch.empty(shape, dtype=torch.uint8, memory_format=torch.channels_last)
        values = address("x", x, torch.float32, x.shape, torch.channels_last)
        norm, shift, gain = before.norm, before.shift, before.gain
        if norm is None:
            own = (before.channels(stride),)
            gains = None if gain is None else address("gains of channels", gain, torch.float32, own) + 4 * lo
            failed = plain(frame, values, gains, *interval, out.data_ptr())
        else:
            shift = None if shift is None else shift.float().contiguous()
            moved = None if shift is None else address("a shift", shift, torch.float32, (batch, stride))
            affine = (
                address("the weight of a norm", norm.weight, torch.float32, (stride,)),
                address("the bias of a norm", norm.bias, torch.float32, (stride,)),
            )
            failed = fused(frame, values, moved, *affine, norm.groups, norm.epsilon, *interval, out.data_ptr())
        if failed:
            raise MemoryError
        return out

    return quantize


def frame_of(
    batch: int,
    stride: int,
    height: int,
    width: int,
    grid: Grid,
    each: bool,
    activation: Activation | None,
    rotated: bool,
) -> tuple[Frame, Tensor | None]:
    """What C is given, and a tensor that has to live as long."""
    lo, hi = grid.channels
    if height == 1 and grid.up == 1 and not any(grid.padding):  # threads share rows
        height, width = width, 1
    sizes = batch, height, width, hi - lo, stride, lo, grid.pitch, *grid.padding, grid.up, each
    kind = (0, 0) if activation is None else (1 + list(ACTIVATIONS).index(activation.name), activation.gated)
    flips = signs(hi) if rotated else None
    where = None if flips is None else address("signs", flips, torch.float32, (hi,))
    return Frame(*sizes, *kind, where, QType(grid.bits).qmax), flips


def native_rotate(library: ctypes.CDLL) -> Rotate:
    """:func:`ptq_tdq.rotate.rotated` on the built library."""
    function = library.rotate
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p]
    function.restype = None
    flips_of = lru_cache(signs)

    @untraced
    def rotate(x: Tensor) -> Tensor:
        x = x.float().contiguous()
        out = torch.empty_like(x)
        channels = x.shape[-1]
        values = address("x", x, torch.float32, x.shape)
        flips = address("signs", flips_of(channels), torch.float32, (channels,))
        function(values, flips, x.numel() // max(1, channels), channels, out.data_ptr())
        return out

    return rotate


def native_weight_only(library: ctypes.CDLL) -> WeightOnly:
    """:data:`~ptq_tdq.runtime.kernels.WeightOnly` on the built library, for few rows; torch takes the others."""
    function = library.weight_only
    function.argtypes = [*[ctypes.c_void_p] * 4, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    function.restype = None

    @untraced
    def linear(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        outputs, channels = codes.shape
        rows = x.numel() // max(1, channels)
        if rows > FEW_ROWS or codes.dtype != torch.int8 or x.shape[-1] != channels:
            return reference_weight_only(x, codes, scale, bias)
        x = x.contiguous()
        out = torch.empty(*x.shape[:-1], outputs, dtype=torch.float32)
        function(
            address("x", x, torch.float32, x.shape),
            address("weights", codes, torch.int8, codes.shape),
            address("the scales of weights", scale, torch.float32, (outputs,)),
            None if bias is None else address("a bias", bias, torch.float32, (outputs,)),
            rows,
            channels,
            outputs,
            out.data_ptr(),
        )
        return out

    return linear


@lru_cache
def _library(march: str) -> ctypes.CDLL:
    """The built library; raises OSError, ValueError or SubprocessError where it cannot be built."""
    compiler = c_compiler()
    wide = WIDE if platform.machine().lower() in ("x86_64", "amd64") else ()
    compile_command = [*compiler, *FLAGS, *wide, f"-march={march}"]
    source = files("ptq_tdq.runtime").joinpath("native.c").read_bytes()
    identity = [source, *map(str.encode, compile_command), _processor()]
    name = hashlib.sha256(b"\0".join(identity)).hexdigest()[:16]
    try:
        path = private_folder(cache_folder() / "native") / f"{name}.so"
    except (OSError, OutputError):  # no place to keep it: it is built for this process alone
        return _opened(_build(compiler, compile_command, source))
    library = read_private(path)
    if library is None:
        library = _build(compiler, compile_command, source)
        with suppress(OSError, OutputError):  # a cache that cannot be written, likewise
            path.unlink(missing_ok=True)
            write_atomic(path, with_digest(library))
    return _opened(library)


def c_compiler() -> list[str]:
    """The command of the C compiler, which ``$CC`` may name with flags or a launcher (``ccache gcc``).

    Raises OSError where there is none.
    """
    chosen = shlex.split(os.environ.get("CC", ""))
    found = chosen or [name for name in ("gcc", "clang", "cc") if shutil.which(name)][:1]
    if not found:
        raise OSError("there is no C compiler")
    return found


def _opened(library: bytes) -> ctypes.CDLL:
    """Load the bytes that were checked or built, and not a file that somebody may have changed since."""
    if hasattr(os, "memfd_create"):  # a file in memory, also where temporary folders must not hold programs
        file = os.memfd_create("ptq-tdq-native")
        with open(file, "wb", closefd=False) as opened:  # stays open: the loader knows libraries by their path
            opened.write(library)
        return ctypes.CDLL(f"/proc/self/fd/{file}")
    with tempfile.TemporaryDirectory() as folder:  # which only this user may enter
        path = Path(folder, "native.so")
        path.write_bytes(library)
        return ctypes.CDLL(str(path))


def _processor() -> bytes:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "".join(sorted({line for line in lines if line.startswith(("model name", "flags"))})).encode()
    except OSError:
        return platform.processor().encode()


def _build(linker: list[str], compile_command: list[str], source: bytes) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        # compiled with OpenMP, linked without its library: torch has loaded one, and two would fight for the cores
        compile_, object_, out = Path(folder, "native.c"), Path(folder, "native.o"), Path(folder, "native.so")
        compile_.write_bytes(source)
        for command in (
            [*compile_command, "-c", str(compile_), "-o", str(object_)],
            [*linker, "-shared", str(object_), "-o", str(out), "-lm"],
        ):
            subprocess.run(command, check=True, capture_output=True, text=True, errors="replace", timeout=BUILD_SECONDS)
        return out.read_bytes()
