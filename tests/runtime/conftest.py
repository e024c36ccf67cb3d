"""Kernels under test: ours where this machine can build them, and oneDNN."""

from __future__ import annotations

import ctypes

import pytest

from ptq_tdq.runtime.native import open_library


@pytest.fixture(scope="session")
def library() -> ctypes.CDLL:
    """The built kernels; a machine without a C compiler tests the torch operations alone."""
    found = open_library()
    if isinstance(found, str):
        pytest.skip(found)
    return found
