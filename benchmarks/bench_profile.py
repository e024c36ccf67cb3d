"""Where the time of a calibration goes, and what ``--dry-run`` would have said of it.

An embedded model is calibrated with preset ``default`` in this process, one thread. Each part's CPU time is its own,
less that of the parts that it calls. One JSON line per run is appended; ``--render`` prints the lines as tables.
"""

from __future__ import annotations

import functools
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import click
import torch
from bench_growth import OwnMemory
from lines import append, parse_choices, read

from ptq_tdq import calibrate, load_model, preset
from ptq_tdq.calib_data import collect_cached
from ptq_tdq.calibration import foresee
from ptq_tdq.recon import activations, closed_form, engine, weights
from ptq_tdq.recon.moments import Inputs
from ptq_tdq.recon.unit import Unit

RESULTS = Path(__file__).parent / "results" / "profile.jsonl"
REST = "the model between units, and all else"
PARTS: dict[str, tuple[tuple[Any, str], ...]] = {
    "learning intervals and biases": ((activations, "_learn"),),
    "losses": ((Unit, "loss"), (Unit, "losses")),
    "outputs of units": ((Unit, "outputs"),),
    "observing": ((activations, "observe"),),
    "what follows t, tokens": ((activations, "choose"), (activations, "choose_tokens")),
    "equalization, rotation": ((engine, "transform_unit"),),
    "intervals of weights": ((weights, "initialize"),),
    "rows of the layers' inputs": ((closed_form, "inputs"), (Inputs, "close")),
    "second moments": ((Inputs, "moments"), (Inputs, "solved")),
    "factors and codes": ((closed_form, "_solve"),),
}


class Profile:
    """CPU seconds of each part, by (phase, part)."""

    def __init__(self) -> None:
        self.spent = defaultdict[tuple[str, str], float](float)
        self.phase, self.inner, self.began = "weights", [0.0], time.process_time()

    def watch(self, owner: Any, name: str, part: str) -> None:
        original = getattr(owner, name)

        @functools.wraps(original)
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.process_time()
            self.inner.append(0.0)
            try:
                return original(*args, **kwargs)
            finally:
                taken = time.process_time() - began
                self.spent[self.phase, part] += taken - self.inner.pop()
                self.inner[-1] += taken

        setattr(owner, name, timed)

    def hear(self, report: engine.UnitReport) -> None:
        """The last unit of phase W ends it."""
        if report.index + 1 == report.total:
            taken = time.process_time() - self.began
            self.spent[self.phase, REST] += taken - self.inner[0]
            self.phase, self.inner[0], self.began = "activations", 0.0, time.process_time()


def measure(name: str, settings: dict[str, str]) -> dict[str, Any]:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    model, config = load_model(name), preset("default", scheme="W4A8", **settings)
    foreseen, profile, memory = foresee(model, config), Profile(), OwnMemory()
    for part, places in PARTS.items():
        for owner, attribute in places:
            profile.watch(owner, attribute, part)
    calls = collect_cached(model, **config.recipe)
    memory.start()
    began = profile.began = time.process_time()
    calibrate(model, config, calls, on_unit=profile.hear)
    return {
        "model": name,
        "rows": len(calls),
        "cpu_seconds": time.process_time() - began,
        "own_peak_bytes": memory.stop(),
        "forecast": foreseen.to_dict(),
        "parts": [[phase, part, seconds] for (phase, part), seconds in profile.spent.items()],
        "choices": config.to_dict(),
        "facts": {"threads": 1},
    }


@click.command()
@click.option("--model", default="reference")
@click.option("--set", "settings", multiple=True, help="A choice, name=value.")
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS)
@click.option("--render", is_flag=True, help="Only print the tables.")
def main(model: str, settings: tuple[str, ...], results: Path, render: bool) -> None:
    if not render:
        append(results, measure(model, parse_choices(settings)))
    print(table(read(results)))


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown: shares of the parts, then what was foretold."""
    names = [f"{line['model']}, {line['rows']} rows" for line in lines]
    rows = [f"| phase | part | {' | '.join(names)} |", "|---|---|" + "---|" * len(names)]
    shares = [{(phase, part): s / line["cpu_seconds"] for phase, part, s in line["parts"]} for line in lines]
    for phase, part in dict.fromkeys(key for share in shares for key in share):
        cells = " | ".join(f"{share.get((phase, part), 0.0):.0%}" for share in shares)
        rows.append(f"| {phase[0].upper()} | {part} | {cells} |")
    for label, taken, foretold, unit in (
        ("CPU seconds", "cpu_seconds", "seconds", 1.0),
        ("memory, GiB", "own_peak_bytes", "memory_bytes", 2.0**30),
    ):
        pairs = [(line[taken] / unit, line["forecast"][foretold] / unit) for line in lines]
        rows.append(f"| | {label} (foretold) | " + " | ".join(f"{a:.3g} ({b:.3g})" for a, b in pairs) + " |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
