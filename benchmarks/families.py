"""The table of denoiser classes in docs/models.md, from a run of the tests.

PTQ_TDQ_FAMILIES=benchmarks/results/families.json pytest tests/conformance/test_denoisers.py tests/export
python benchmarks/families.py benchmarks/results/families.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

COLUMNS = {"simulated_db": "quantized (W8A8)", "integer_db": "integer", "portable_db": "ONNX portable"}


def table(families: dict[str, dict[str, Any]]) -> str:
    """A markdown table with one row per class; an empty cell is what was not run, "no" what ended in a sentence."""
    rows = [f"| denoiser | {' | '.join(COLUMNS.values())} | quantized share |", "|---|---|---|---|---|"]
    for name, found in families.items():
        ratios = [_cell(found, key) for key in COLUMNS]
        rows.append(f"| {name} | {' | '.join(ratios)} | {found['coverage']:.1%} |")
    return "\n".join(rows)


def _cell(found: dict[str, Any], key: str) -> str:
    if key not in found:
        return ""
    return "no" if found[key] is None else f"{found[key]:.0f} dB"


if __name__ == "__main__":
    print(table(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
