"""The kernels as other processors have them: older ones' run on newer ones."""

from __future__ import annotations

import ctypes
import platform

import pytest
import torch

from ptq_tdq.runtime.native import open_library

MARCH = {"native": "native", "AVX2": "haswell", "portable": "x86-64"}


def library_of(kind: str) -> ctypes.CDLL:
    """The library built for a kind of processor; skips a test where it cannot run."""
    capability = torch.backends.cpu.get_cpu_capability()
    if (kind == "portable" and platform.machine() != "x86_64") or (kind == "AVX2" and "AVX" not in capability):
        pytest.skip(f"this processor does not run {kind}")
    library = open_library(MARCH[kind])
    if isinstance(library, str):
        pytest.skip(library)
    return library
