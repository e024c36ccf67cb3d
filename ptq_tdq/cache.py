"""The user's cache folder: calibration sets and built native code."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return ``$PTQ_TDQ_CACHE``, or ``~/.cache/ptq-tdq`` where that is not set."""
    folder = os.environ.get("PTQ_TDQ_CACHE")
    return Path(folder) if folder else Path.home() / ".cache" / "ptq-tdq"
