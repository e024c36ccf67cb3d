"""The README's table of denoisers is the one that its script makes."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_readme_shows_the_committed_results() -> None:
    families = json.loads((ROOT / "benchmarks/results/families.json").read_text(encoding="utf-8"))
    table = runpy.run_path(str(ROOT / "benchmarks/families.py"))["table"]
    _, shown, _ = (
        (ROOT / "README.md").read_text(encoding="utf-8").replace("<!-- end of", "<!--").split("<!-- families -->")
    )
    assert shown.strip() == table(families)
