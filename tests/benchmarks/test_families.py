"""The table of denoisers in docs/models.md is the one that its script makes."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_page_shows_the_committed_results() -> None:
    families = json.loads((ROOT / "benchmarks/results/families.json").read_text(encoding="utf-8"))
    table = runpy.run_path(str(ROOT / "benchmarks/families.py"))["table"]
    _, shown, _ = (
        (ROOT / "docs/models.md").read_text(encoding="utf-8").replace("<!-- end of", "<!--").split("<!-- families -->")
    )
    assert shown.strip() == table(families)
