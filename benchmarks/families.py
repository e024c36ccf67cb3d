"""The tables of denoiser classes in docs/models.md and, in short, in README.md, from a run of the tests.

PTQ_TDQ_FAMILIES=benchmarks/results/families.json pytest tests/conformance/test_denoisers.py tests/export
python benchmarks/families.py benchmarks/results/families.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

KINDS = {
    "U-Nets": "UNet",
    "transformers for images": "2D",
    "transformers for video": "3D",
    "others, most for audio": "",
}
"""What is in the name of a class of each kind; the first one counts."""
COLUMNS = {"simulated_db": "quantized (W8A8)", "integer_db": "integer", "portable_db": "ONNX portable"}


def table(families: dict[str, dict[str, Any]]) -> str:
    """A markdown table with one row per class; an empty cell is what was not run, "no" what ended in a sentence."""
    rows = [f"| denoiser | {' | '.join(COLUMNS.values())} | quantized share |", "|---|---|---|---|---|"]
    for name, found in families.items():
        ratios = [_cell(found, key) for key in COLUMNS]
        rows.append(f"| {name} | {' | '.join(ratios)} | {found['coverage']:.1%} |")
    return "\n".join(rows)


def summary(families: dict[str, dict[str, Any]]) -> str:
    """How many denoisers of each kind were quantized, and how many of those that were tried run in another form."""
    rows = ["| denoisers | simulated | integer | ONNX |", "|---|---|---|---|"]
    of: dict[str, list[dict[str, Any]]] = {}
    for name, found in families.items():
        of.setdefault(next(kind for kind, mark in KINDS.items() if mark in name), []).append(found)
    for kind in KINDS:
        ran = [_ran(of[kind], key) for key in COLUMNS]
        rows.append(f"| {kind} | {' | '.join(ran)} |")
    return "\n".join(rows)


def _ran(families: list[dict[str, Any]], key: str) -> str:
    tried = [found[key] for found in families if key in found]
    return f"{sum(value is not None for value in tried)} of {len(tried)}"


def _cell(found: dict[str, Any], key: str) -> str:
    if key not in found:
        return ""
    return "no" if found[key] is None else f"{found[key]:.0f} dB"


if __name__ == "__main__":
    results = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    print(summary(results), table(results), sep="\n\n")
