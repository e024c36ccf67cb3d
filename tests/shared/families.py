"""Keeps what works on each denoiser, for the table in docs/models.md (``benchmarks/families.py``)."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def keep(name: str, found: dict[str, Any]) -> None:
    """Add to the entry of a denoiser in the JSON file ``$PTQ_TDQ_FAMILIES``, where that is set."""
    if not (path := os.environ.get("PTQ_TDQ_FAMILIES")):
        return
    file = Path(path)
    known: dict[str, dict[str, Any]] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    known.setdefault(name, {}).update(found)
    file.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
