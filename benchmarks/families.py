"""The README's table of denoiser classes, from a run of the conformance test.

PTQ_TDQ_FAMILIES=families.json pytest tests/conformance/test_denoisers.py
python benchmarks/families.py families.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def table(families: dict[str, dict[str, Any]]) -> str:
    """A markdown table with one row per class; an empty cell is what did not work in that run."""

    def cell(found: dict[str, Any], key: str) -> str:
        return f"{found[key]:.0f} dB" if key in found else ""

    rows = ["| denoiser | simulated | integer | coverage |", "|---|---|---|---|"]
    for name, found in families.items():
        numbers = cell(found, "simulated_db"), cell(found, "integer_db"), f"{found['coverage']:.1%}"
        rows.append(f"| {name} | {' | '.join(numbers)} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(table(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
