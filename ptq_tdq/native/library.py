"""Builds C on demand with the system's compiler, and opens it; without one, torch does the work.

A library is kept in a private folder of the user's cache, under a name that follows from its source, the flags and the
processor. It shares torch's OpenMP threads, since it is linked without a library of its own.
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

from ptq_tdq.atomic import write_atomic
from ptq_tdq.cache import cache_folder, private_folder, read_private, with_digest
from ptq_tdq.errors import OutputError

FLAGS = ("-std=gnu11", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC")
WIDE = ("-mprefer-vector-width=512",)  # of x86: compilers take half the vectors of Intel's processors by themselves
BUILD_SECONDS = 300  # a compiler that takes longer hangs
SWITCH = "PTQ_TDQ_NATIVE"  # 0 = never build or use native code


def load_c(package: str, source: str, march: str = "native") -> ctypes.CDLL | str:
    """The library of a C file of a package, for a processor as compilers name it; or a clause that says why not."""
    if os.environ.get(SWITCH) == "0":
        return f"{SWITCH}=0"
    try:
        return _library(package, source, march)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        detail = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        return f"no native kernels: {detail[0] if detail else type(error).__name__}"


@lru_cache
def _library(package: str, source: str, march: str) -> ctypes.CDLL:
    """The built library; raises OSError, ValueError or SubprocessError where it cannot be built."""
    compiler = c_compiler()
    wide = WIDE if platform.machine().lower() in ("x86_64", "amd64") else ()
    compile_command = [*compiler, *FLAGS, *wide, f"-march={march}"]
    content = files(package).joinpath(source).read_bytes()
    identity = [content, *map(str.encode, compile_command), _processor()]
    name = hashlib.sha256(b"\0".join(identity)).hexdigest()[:16]
    try:
        path = private_folder(cache_folder() / "native") / f"{name}.so"
    except (OSError, OutputError):  # no place to keep it: it is built for this process alone
        return _opened(_build(compiler, compile_command, content))
    library = read_private(path)
    if library is None:
        library = _build(compiler, compile_command, content)
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
