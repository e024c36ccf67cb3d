"""Our reconstruction engine against the published loop: iterations per second, and time to the same loss.

The engine sweeps the embedded model as ``ptq-tdq calibrate`` does. At each unit both learn from the same inputs,
targets and first intervals, one after the other in one process: ours with preset ``default`` (which rounds weights in
closed form, and again at the end of phase A; ``--set rounding=adaround`` compares the loops), the published loop
(``published_loop.py``: composed ops, NCHW float32, its own learning rates) for each number of ``--iterations``. In
phase A both start from the weights of our phase W. The sweep goes on with our result. Losses are evaluated in float32
over all samples, outside the published loop's time and inside ours. One JSON line per (phase, unit) is appended; a run
that ``--minutes`` stopped goes on when it is started again. ``--render`` prints the sums.

"The loss of the whole model" is the sum of its units' final losses, of each phase: sum over channels, mean over the
rest, power 2 in phase W and 2.4 in phase A.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click
import torch
from lines import append, parse_choices, read
from published_loop import cache_pass, learn_activations, learn_weights, published_copy, replace_quantizers

from ptq_tdq import load_model, preset
from ptq_tdq.calib_data import collect_cached
from ptq_tdq.choices import ungrouped
from ptq_tdq.config import Config
from ptq_tdq.plan import make_plan
from ptq_tdq.quantized_model import QuantizedModel
from ptq_tdq.recon import RunDirectory, activations, engine, reconstruct, weights
from ptq_tdq.recon.parts import Parts
from ptq_tdq.recon.streams import UnitCall
from ptq_tdq.recon.unit import Unit
from ptq_tdq.wrap import folded_copy

RESULTS = Path(__file__).parent / "results" / "engine.jsonl"
Line = dict[str, Any]


class OutOfTime(Exception):
    """The minutes given are over; what is finished is kept."""


class Bench:
    """Runs the engine with the published loop beside it; ``learn`` of each phase is timed on its own."""

    def __init__(self, config: Config, iterations: tuple[int, ...], results: Path, deadline: float) -> None:
        self.config, self.iterations, self.results, self.deadline = config, iterations, results, deadline
        self.learning = 0.0  # seconds of the last learning loop of ours, which evaluates nothing

    def weights(self, original: Any) -> Any:
        def reconstruct_weights(
            unit: Unit, full: UnitCall, call: UnitCall, target: Parts, config: Config, generator: torch.Generator
        ) -> weights.WeightResult:
            self.stop_in_time()
            other = published_copy(unit)
            began = time.process_time()
            result: weights.WeightResult = original(unit, full, call, target, config, generator)
            ours = {"iterations": config.weights.weight_iterations, "seconds": time.process_time() - began}
            published = []
            for count in self.iterations:
                for layer in other.layers():
                    weights.initialize(layer, config)
                began = time.process_time()
                learn_weights(other, call, target, count, config.learning.batch_size, torch.Generator().manual_seed(0))
                seconds = time.process_time() - began
                loss = other.loss(call, target, weights.LOSS_POWER)
                published.append({"iterations": count, "seconds": seconds, "loss": loss})
            self.write(
                "weights", unit, ours | {"learning": self.learning, "loss": result.after}, published, result.before
            )
            return result

        return reconstruct_weights

    def activations(self, original: Any) -> Any:
        def reconstruct_activations(
            unit: Unit, full: UnitCall, call: UnitCall, target: Parts, config: Config, *rest: Any
        ) -> activations.ActivationResult:
            self.stop_in_time()
            other = published_copy(unit)
            began = time.process_time()
            result: activations.ActivationResult = original(unit, full, call, target, config, *rest)
            ours = {"iterations": config.activations.activation_iterations, "seconds": time.process_time() - began}
            published = []
            for count in self.iterations:
                scales = replace_quantizers(other, result.static)
                began = time.process_time()
                learn_activations(
                    other, call, target, scales, count, config.learning.batch_size,
                    torch.Generator().manual_seed(0), config.activations.loss_power,
                )  # fmt: skip
                seconds = time.process_time() - began
                loss = other.loss(call, target, config.activations.loss_power)
                published.append({"iterations": count, "seconds": seconds, "loss": loss})
            ours |= {"learning": self.learning, "loss": result.after}
            self.write("activations", unit, ours, published, result.before)
            return result

        return reconstruct_activations

    def timed(self, original: Any) -> Any:
        def learn(*args: Any) -> Any:
            began = time.process_time()
            result = original(*args)
            self.learning = time.process_time() - began
            return result

        return learn

    def stop_in_time(self) -> None:
        self.learning = 0.0
        if time.monotonic() > self.deadline:
            raise OutOfTime

    def write(self, phase: str, unit: Unit, ours: Line, published: list[Line], before: float) -> None:
        line = {
            "phase": phase, "unit": unit.name, "loss_before": before, "ours": ours, "published": published,
            "choices": self.config.to_dict(),
        }  # fmt: skip
        append(self.results, line)
        print(phase, unit.name, f"{before:.5f}", ours, published, flush=True)


@click.command()
@click.option("--scheme", default="W4A8")
@click.option("--method", default="static", help="The published loop learns static intervals; so do we.")
@click.option("--iterations", default="50", help="Iterations of the published loop, separated by commas.")
@click.option("--set", "settings", multiple=True, help="A choice of ours, name=value.")
@click.option("--minutes", default=9.0, help="Stop before the next unit after so many minutes.")
@click.option(
    "--work", type=click.Path(path_type=Path), default=Path("build/engine"), help="Folder of the unfinished run."
)
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS)
@click.option("--threads", default=1)
@click.option("--render", is_flag=True, help="Only print the sums.")
def main(
    scheme: str, method: str, iterations: str, settings: tuple[str, ...], minutes: float, work: Path, results: Path,
    threads: int, render: bool,
) -> None:  # fmt: skip
    if not render:
        torch.set_num_threads(threads)
        torch.set_flush_denormal(True)
        config = preset("default", scheme=scheme, method=method, **parse_choices(settings))
        counts = tuple(int(n) for n in iterations.split(",") if n)
        run(config, Bench(config, counts, results, time.monotonic() + 60 * minutes), work)
    print(table(read(results)))


def run(config: Config, bench: Bench, work: Path) -> None:
    """Both phases over all units; the engine's two learning functions are wrapped by the bench."""
    model = load_model()
    calls = collect_cached(model, **config.recipe)
    plan = make_plan(folded_copy(model.denoiser), config, calls)
    quantized = QuantizedModel.copy_of(model.denoiser, calls.axis, plan.layers)
    for name, wrap in (("reconstruct_weights", bench.weights), ("reconstruct_activations", bench.activations)):
        setattr(engine, name, wrap(getattr(engine, name)))
    weights._learn, activations._learn = bench.timed(weights._learn), bench.timed(activations._learn)
    directory = RunDirectory(work, {key: str(value) for key, value in ungrouped(config.to_dict()).items()})
    try:
        reconstruct(quantized, calls, config, special=plan.special, run=directory)
    except OutOfTime:
        print("Stopped in time; start the same command again.")
        return
    caching: dict[str, float] = {}
    for phase in ("weights", "activations"):
        seconds = 0.0
        for name in quantized.units():
            for on in (False, True):
                quantized.quantize(weights=on, activations=on and phase == "activations")
                began = time.process_time()
                forwards = [lambda c=c: quantized(**calls.inputs(c)) for c in calls.chunks(32)]
                cache_pass(quantized.model.get_submodule(name), forwards)
                seconds += time.process_time() - began
        caching[phase] = seconds
    append(bench.results, {"phase": "caching", "seconds": caching})


def table(lines: list[Line]) -> str:
    """Markdown: sums over units, per phase."""
    caching: Line = next((line["seconds"] for line in lines if line["phase"] == "caching"), {})
    rows = [
        "| phase | loop | iterations | ms per iteration, all units | seconds | loss, all units |",
        "|---|---|---|---|---|---|",
    ]
    for phase in ("weights", "activations"):
        here = [line for line in lines if line["phase"] == phase]
        if not here:
            continue
        ours = [line["ours"] for line in here]
        each = sum(o["learning"] / max(o["iterations"], 1) for o in ours) * 1e3
        count = ours[0]["iterations"] if each else 0  # none where the closed form did it
        rows.append(row(phase, "first intervals", 0, 0.0, 0.0, sum(line["loss_before"] for line in here)))
        rows.append(row(phase, "ours", count, each, total(ours, "seconds"), total(ours, "loss")))
        for k in range(len(here[0]["published"])):
            other = [line["published"][k] for line in here]
            each = sum(o["seconds"] / max(o["iterations"], 1) for o in other) * 1e3
            seconds = total(other, "seconds") + caching.get(phase, 0.0)
            rows.append(row(phase, "published", other[0]["iterations"], each, seconds, total(other, "loss")))
    return "\n".join(rows)


def total(cells: list[Line], key: str) -> float:
    return float(sum(cell[key] for cell in cells))


def row(phase: str, name: str, iterations: int, each: float, seconds: float, loss: float) -> str:
    return f"| {phase} | {name} | {iterations} | {each:.0f} | {seconds:.0f} | {loss:.4f} |"


if __name__ == "__main__":
    main()
