"""Fine-tuning on the embedded model: quantizers with and without TDQ, the supplement's Tables 1, 2, 5, 6 and 7.

A cell is a scheme, a quantizer, an interval source, choices that differ, a seed and a number of iterations. All of a
scheme start at one calibrated artifact with one interval per activation, kept in WORK with the full-precision side of
the evaluation; the seed is that of the data, of what is drawn while learning, and of the evaluation's noise. First and
last layer, time embedding and attention products stay in floating point, as in the authors' code. The JSON line of a
finished cell is appended and synced at once; cells whose line is there are skipped, and an interrupted one goes on at
its last checkpoint. ``--render`` prints the tables: means and deviations over seeds.
``--tables`` says which cells: 5 (quantizers), 6 (bits), 1 (dynamic), 2 (time encodings), 7 (initialisations), data
(training on images beside imitation; needs ``--data``), minutes (fewer and more iterations). ``--prepare`` only
calibrates what they start from; ``--processes`` run as many cells at once, on a GPU that one alone does not fill.
``--pace`` times iterations instead, on a GPU launched kernel by kernel and as CUDA graphs in turns.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from statistics import mean, median, stdev
from time import perf_counter
from typing import Any

import click
import torch
from lines import append, facts, parse_choices, read

from ptq_tdq import FinetuneConfig, calibrate, finetune, load_model, preset
from ptq_tdq.artifacts import Artifact, read_artifact
from ptq_tdq.calib_data import LoadedModel, collect_cached
from ptq_tdq.evaluate.baseline import Baseline, load_baseline, make_baseline, save_baseline
from ptq_tdq.finetuning import IterationReport, recipe
from ptq_tdq.load import build_quantized

RESULTS = Path(__file__).parent / "results" / "finetune.jsonl"
AUTHORS = {  # what stays in floating point in the authors' code
    "float_layers": ("first", "last", "time_embedding"),
    "eight_bit_layers": (),
    "weight_only_layers": (),
    "attention": False,
    "method": "static",
}
SHOWN = ("fd_c10", "fd_c10_second", "latent_sqnr_db", "mean_noise_sqnr_db")
Line = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One line to be; no quantizer: calibrated only."""

    scheme: str
    seed: int
    quantizer: str | None = None
    method: str = "keep"
    iterations: int = 0
    data: bool = False
    choices: dict[str, Any] = field(default_factory=dict)

    def key(self) -> str:
        return json.dumps(vars(self), sort_keys=True)


Kind = tuple[str, str, str, dict[str, Any], int, bool]
"""Scheme, quantizer, method, choices, the divisor of the iterations, and whether it learns from images."""
START = {"module_start": "as-is"}  # in whose place a fitted start would hide the initialisation
TABLES: dict[str, list[Kind]] = {
    "5": [("W4A4", q, m, {}, 1, False) for q in ("lsq", "pact", "nipq", "duq", "qil") for m in ("static", "tdq")],
    "6": [("W3A3", q, m, {}, 1, False) for q in ("lsq", "duq") for m in ("static", "tdq")],
    "1": [
        ("W4A4", "lsq", m, {}, 1, False)
        for m in ("static", "dynamic", "dynamic-statistics", "dynamic-statistics-time", "tdq")
    ],
    "2": [
        ("W4A4", "lsq", "tdq", {**START, "time_encoding": e}, 1, False)
        for e in ("none", "normalize", "fourier", "frequency")
    ],
    "7": [
        ("W4A4", "lsq", "tdq", {**START, "module_weights": w}, 1, False) for w in ("he", "gaussian", "zero", "xavier")
    ],
    "data": [("W4A4", "lsq", "tdq", {}, 1, data) for data in (False, True)],
    "minutes": [("W4A4", "lsq", "tdq", {}, part, False) for part in (8, 4, 2, 1)],
}


def cells(tables: list[str], seeds: int, iterations: int) -> Iterator[Cell]:
    """The cells of some tables, the first seed of all of them first."""
    kinds = [kind for table in tables for kind in TABLES[table]]
    for seed in range(seeds):
        for scheme in dict.fromkeys(scheme for scheme, *_ in kinds):
            yield Cell(scheme, seed)
        for scheme, quantizer, method, choices, part, data in kinds:
            yield Cell(scheme, seed, quantizer, method, max(1, iterations // part), data, choices)


class Bench:
    """The embedded model with what cells share."""

    def __init__(
        self,
        work: Path,
        data: Path | None,
        samples: int,
        steps: int,
        settings: dict[str, Any],
        calibration: dict[str, Any],
        device: str,
    ) -> None:
        self.work, self.data, self.samples, self.steps = work, data, samples, steps
        self.settings, self.calibration = settings, calibration
        self.model: LoadedModel = load_model(device=device)
        self._baselines: dict[int, Baseline] = {}

    def run(self, cell: Cell) -> Line:
        """The line of a cell."""
        began, held_out, start = self.artifact(cell.scheme), None, perf_counter()
        quantized = build_quantized(began, self.model.denoiser).to(self.model.denoiser.device)
        if cell.quantizer:
            own = {"quantizer": cell.quantizer, "method": cell.method, "iterations": cell.iterations, "seed": cell.seed}
            config = FinetuneConfig().changed({**self.settings, **cell.choices, **own})
            data = self.data if cell.data else collect_cached(self.model, **recipe(config))
            folder = (
                self.work
                / f"{cell.scheme}-{cell.quantizer}-{hashlib.sha256(cell.key().encode()).hexdigest()[:12]}.partial"
            )
            quantized = finetune(self.model, began, config, data, run_directory=folder, on_iteration=_say)
            held_out = quantized.metrics["finetune"]["held_out"]
        seconds = perf_counter() - start
        measured = self.baseline(cell.seed).measure(quantized).results
        about = {"settings": self.settings, "samples": self.samples, "device": device_name(self.model.denoiser.device)}
        found = {**about, "held_out": held_out, "seconds": seconds, **measured}
        return {"key": cell.key(), **vars(cell), **found, "facts": facts()}

    def artifact(self, scheme: str) -> Artifact:
        """The calibrated model of a scheme."""
        folder = self.work / f"calibrated-{scheme}"
        if not folder.exists():
            config = preset("default", **{**AUTHORS, **self.calibration, "scheme": scheme})
            calls = collect_cached(self.model, **config.recipe)
            calibrate(self.model, config, calls, run_directory=folder.with_suffix(".partial")).save_pretrained(folder)
        return read_artifact(folder)

    def baseline(self, seed: int) -> Baseline:
        """Full precision, from the noise of a seed."""
        if seed not in self._baselines:
            request: dict[str, Any] = {"samples": self.samples, "num_inference_steps": self.steps, "seed": seed}
            folder = self.work / f"baseline-{seed}"
            found = load_baseline(folder, self.model, **request)
            if found is None:
                found = make_baseline(self.model, **request)
                folder.mkdir(exist_ok=True)
                save_baseline(folder, found)
            self._baselines[seed] = found
        return self._baselines[seed]

    def pace(self, iterations: int) -> Line:
        """Seconds of an iteration at W4A4, the median: LSQ with static intervals and with TDQ, as CUDA graphs too."""
        began, device = self.artifact("W4A4"), self.model.denoiser.device
        base = FinetuneConfig().changed({**self.settings, "iterations": iterations, "trajectories": 64})
        data = collect_cached(self.model, **recipe(base))
        seconds: dict[str, list[float]] = {}
        for method, graph in [*product(("static", "tdq"), (False, True)[: 1 + (device.type == "cuda")])] * 2:
            ends: list[float] = []
            config = base.changed({"method": method, "cuda_graph": graph})
            finetune(self.model, began, config, data, on_iteration=partial(_note, ends))
            seconds.setdefault(f"{method}{' graph' * graph}", []).extend(b - a for a, b in pairwise(ends[5:]))
        return {"seconds": {k: median(v) for k, v in seconds.items()}, "device": device_name(device), "facts": facts()}


def _note(ends: list[float], iteration: Any) -> None:
    ends.append(perf_counter())


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


_bench: list[Bench] = []  # of this process


def _begin(threads: int, options: dict[str, Any]) -> None:
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    _bench.append(Bench(**options))


def _run(cell: Cell) -> Line:
    return _bench[0].run(cell)


def _say(report: IterationReport) -> None:
    if report.iteration % 50 == 0:
        left = report.seconds * (report.total - report.iteration) / 60
        click.echo(f"{report.iteration}/{report.total} loss {report.loss:.5f}, {left:.0f} minutes left", err=True)


def render(lines: list[Line]) -> str:
    """Markdown: mean and deviation over seeds."""
    groups: dict[tuple[Any, ...], list[Line]] = {}
    for line in lines:
        what = line["scheme"], line["quantizer"] or "calibrated only", line["method"], line["iterations"]
        groups.setdefault((*what, line["data"], json.dumps(line["choices"])), []).append(line)
    heads = "scheme", "quantizer", "method", "iterations", "images", "choices", "seeds", *SHOWN
    rows = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for key, found in groups.items():
        values = [[line[name] for line in found if line.get(name) is not None] for name in SHOWN]
        rows.append(f"| {' | '.join([*map(str, key), str(len(found)), *map(_mean, values)])} |")
    return "\n".join(rows)


def compared(lines: list[Line]) -> str:
    """Markdown: what TDQ changes beside static intervals, on each seed that has both."""
    plain = {
        (line["scheme"], line["quantizer"], line["iterations"], line["seed"], line["method"]): line
        for line in lines
        if line["quantizer"] and not line["choices"] and not line["data"]
    }
    groups: dict[tuple[Any, ...], list[tuple[Line, Line]]] = {}
    for (*what, seed, method), line in sorted(plain.items()):
        if method == "static" and (other := plain.get((*what, seed, "tdq"))):
            groups.setdefault(tuple(what), []).append((line, other))
    heads = "scheme", "quantizer", "iterations", "seeds", "held out, ratio", *SHOWN
    rows = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for cell, pairs in groups.items():
        ratios = ", ".join(f"{after['held_out']['after'] / before['held_out']['after']:.3f}" for before, after in pairs)
        values = [", ".join(f"{after[name] - before[name]:+.3f}" for before, after in pairs) for name in SHOWN]
        seeds = ", ".join(str(before["seed"]) for before, _ in pairs)
        rows.append(f"| {' | '.join([*map(str, cell), seeds, ratios, *values])} |")
    return "\n".join(rows)


def _mean(values: list[float]) -> str:
    if not values:
        return ""
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


@click.command()
@click.option("--tables", default="5,6")
@click.option("--seeds", default=3)
@click.option("--iterations", default=2000)
@click.option("--samples", default=1000)
@click.option("--steps", default=25, help="Of the sampler.")
@click.option("--data", type=click.Path(exists=True, path_type=Path), help="npz of images, for table 'data'.")
@click.option("--work", type=click.Path(path_type=Path), default=Path("finetune.jsonl.work"))
@click.option("--set", "settings", multiple=True, help="KEY=VALUE of fine-tuning, in all cells.")
@click.option("--calibration", multiple=True, help="KEY=VALUE of calibration, in all cells.")
@click.option("--threads", default=1, help="Of each process.")
@click.option("--processes", default=1, help="Cells at once.")
@click.option("--device", default="cpu")
@click.option("--prepare", is_flag=True, help="Only calibrate what the cells start from.")
@click.option("--pace", is_flag=True, help="Only time iterations.")
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS)
@click.option("--render", "rendered", is_flag=True, help="Only print the tables.")
def main(
    tables: str,
    seeds: int,
    iterations: int,
    threads: int,
    processes: int,
    prepare: bool,
    pace: bool,
    results: Path,
    rendered: bool,
    **options: Any,
) -> None:
    """Run the cells that have no line yet."""
    known = read(results)
    if rendered:
        click.echo(f"{render(known)}\n\nTDQ beside static intervals, each seed:\n\n{compared(known)}")
        return
    for name in ("settings", "calibration"):
        options[name] = parse_choices(options[name])
    options["work"].mkdir(parents=True, exist_ok=True)
    done = {line["key"] for line in known}
    wanted = [
        cell
        for cell in {cell.key(): cell for cell in cells(tables.split(","), seeds, iterations)}.values()
        if cell.key() not in done and not (cell.data and options["data"] is None)
    ]
    _begin(threads, options)
    if pace:
        click.echo(json.dumps(_bench[0].pace(iterations)))
        return
    for cell in wanted:
        _bench[0].artifact(cell.scheme)
        if not prepare:
            _bench[0].baseline(cell.seed)
    if prepare:
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, spawn, _begin, (threads, options)) as pool:
        for future in as_completed([pool.submit(_run, cell) for cell in wanted]):
            if error := future.exception():  # the others go on
                click.echo(error, err=True)
                continue
            click.echo(append(results, future.result())["key"], err=True)


if __name__ == "__main__":
    main()
