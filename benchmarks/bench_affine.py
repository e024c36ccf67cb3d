"""What fake quantization and the search for intervals gain by C: with it and with torch's operators.

One JSON line per model: one thread, W4A8, CPU milliseconds of a call ("run") and of a call with the gradients of its
input ("learn": they pass every quantizer, as when intervals are learned). One line of the search, without a model: the
intervals of a weight of 256 x 2,304, and of an activation at 25 steps, both ends in turn. Both ways take turns in one
process; the medians of several rounds, and the median of their ratios.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any
from unittest.mock import patch

import click
import torch
from bench_runtime import Subject
from lines import append, read
from subjects import call_of

from ptq_tdq import affine, load_quantized
from ptq_tdq.calls import main_argument, prediction
from ptq_tdq.native import affine as native
from ptq_tdq.observe import Observer
from ptq_tdq.scheme import QType
from ptq_tdq.search import activation_qparams, row_qparams

RESULTS = Path(__file__).parent / "results" / "affine.jsonl"


@click.command()
@click.option("--models", default="embedded,random,reference-dit,sd15-quarter", help="Empty: only the search.")
@click.option("--batch", default=8)
@click.option("--rounds", default=15)
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS)
@click.option("--render", is_flag=True, help="Only print the table.")
def main(models: str, batch: int, rounds: int, results: Path, render: bool) -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    with tempfile.TemporaryDirectory() as folder:
        for name in [] if render else filter(None, models.split(",")):
            found = measure(Subject(name, Path(folder) / name), batch, rounds)
            append(results, {"model": name, "batch": batch, **found})
    if not render:
        append(results, {"model": None, **searches(rounds)})
    print(table(read(results)))


def measure(subject: Subject, batch: int, rounds: int) -> dict[str, Any]:
    model, inputs = load_quantized(subject.folder / "W4A8"), call_of(subject.calls, batch, 500)
    name = main_argument(inputs, subject.calls.axis.argument)

    def run() -> None:
        with torch.no_grad():
            model(**inputs)

    def learn() -> None:
        x = inputs[name].detach().requires_grad_()
        prediction(model(**inputs | {name: x})).square().mean().backward()

    return {what: paired(call, rounds, affine, "grid_of") for what, call in (("run", run), ("learn", learn))}


def searches(rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    weight, x, t = torch.randn(256, 2304), torch.randn(25, 4000), torch.arange(25.0)
    observer = Observer("x", t)
    observer.see(x, t)
    observer.start_counting()
    observer.see(x, t)
    histogram = observer.histogram()
    kinds: dict[str, Callable[[], object]] = {
        "weight": lambda: row_qparams(weight, QType(4)),
        "activation": lambda: activation_qparams(histogram, QType(8), method="mse-ends"),
    }
    return {what: paired(call, rounds, native, "interval_errors") for what, call in kinds.items()}


def paired(call: Callable[[], object], rounds: int, module: ModuleType, function: str) -> dict[str, float]:
    """Milliseconds with C and with torch's operators (``function`` finds nothing), and the ratio of both."""
    ways = getattr(module, function), lambda *_: None
    spent: tuple[list[float], list[float]] = [], []
    for _ in range(rounds + 1):
        for way, times in zip(ways, spent, strict=True):
            with patch.object(module, function, way):
                began = time.process_time()
                call()
                times.append(1000 * (time.process_time() - began))
    c, other = (times[1:] for times in spent)  # the first round warms up
    return {"c": median(c), "torch": median(other), "ratio": median(b / a for a, b in zip(c, other, strict=True))}


def table(lines: list[dict[str, Any]]) -> str:
    rows = [
        "| model | call, C (ms) | torch (ms) | ratio | with gradients, C (ms) | torch (ms) | ratio |",
        "|---" * 7 + "|",
    ]
    for line in (line for line in lines if "run" in line):
        cells = (line[what][key] for what in ("run", "learn") for key in ("c", "torch", "ratio"))
        rows.append(f"| {line['model']} | {' | '.join(f'{cell:.3g}' for cell in cells)} |")
    for line in (line for line in lines if "weight" in line):
        rows += [f"search, {what}: ratio {line[what]['ratio']:.3g}" for what in ("weight", "activation")]
    return "\n".join(rows)


if __name__ == "__main__":
    main()
