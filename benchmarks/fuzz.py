"""Changes files and reads them, as tests/properties/test_fuzz.py does, many more times; keeps a line with the outcomes.

python benchmarks/fuzz.py --cases 100000
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import click
from lines import append

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "shared"))
from fuzzing import fuzz, make_subjects  # noqa: E402


@click.command()
@click.option("--cases", type=click.IntRange(min=1), default=100_000, show_default=True, help="How many.")
@click.option("--first", type=click.IntRange(min=0), default=0, show_default=True, help="The number of the first.")
@click.option("--results", type=click.Path(path_type=Path), default=ROOT / "benchmarks/results/fuzz.jsonl")
def main(cases: int, first: int, results: Path) -> None:
    """Append one line to RESULTS: how many cases ended how, and the numbers of those that ended wrongly."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        make_subjects(Path(folder))
        outcomes, wrong = fuzz(Path(folder), first, cases)
    for case in wrong:
        click.echo(f"case {case['case']}: {case['wrong']}", err=True)
    line = {
        "first": first,
        "cases": cases,
        "outcomes": dict(sorted(outcomes.items())),
        "wrong": [case["case"] for case in wrong],
        "seconds": round(time.monotonic() - began),
    }
    append(results, line)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
