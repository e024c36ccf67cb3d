"""What each way to round a unit's weights leaves, on samples that it learned from and on fresh trajectories.

The engine sweeps an embedded model's phase W as ``ptq-tdq calibrate`` does (preset ``default``), with the calibration
set and the rows of ``--fresh`` trajectories of another seed side by side; nothing learns from the latter. At each of
``--units`` every way starts from the same inputs and first intervals, in floating-point activations: "nearest",
"closed" (the closed form), "learned" (what preset ``default`` does from there; without a held-out trajectory that
gains, the closed form) and "adaround" with as many iterations at a rate of 1e-2. The loss is that of phase W: sum over
channels, mean over the rest, power 2. "inherited" is what the unit's inputs alone leave. One JSON line per unit, with
CPU seconds. The sweep goes on with the closed form. ``--render`` prints the table.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch
from lines import append, parse_choices, read

from ptq_tdq import load_model, preset
from ptq_tdq.calib_data import collect_cached
from ptq_tdq.calls import Calls
from ptq_tdq.config import Config
from ptq_tdq.plan import make_plan
from ptq_tdq.quantized_model import QuantizedModel
from ptq_tdq.recon import engine, reconstruct
from ptq_tdq.recon.parts import Parts
from ptq_tdq.recon.streams import UnitCall
from ptq_tdq.recon.unit import Unit
from ptq_tdq.recon.weights import LOSS_POWER, WeightResult, reconstruct_weights, round_last
from ptq_tdq.wrap import folded_copy

RESULTS = Path(__file__).parent / "results" / "rounding.jsonl"
FRESH_SEED = 12345
Line = dict[str, Any]


class Done(Exception):
    """The last unit that was asked for is measured."""


class Bench:
    """Stands in for the engine's phase W: rounds each unit by the calibration rows, and measures ``units``."""

    def __init__(self, config: Config, rows: int, units: list[str], about: Line, results: Path) -> None:
        self.config, self.rows, self.units, self.about, self.results = config, rows, units, about, results

    def __call__(
        self, unit: Unit, full: UnitCall, call: UnitCall, target: Parts, config: Config, generator: torch.Generator
    ) -> WeightResult:
        calibration = torch.arange(len(unit.t)) < self.rows
        self.unit, self.fresh = replace(unit, among=calibration), replace(unit, among=~calibration)
        self.call, self.target = call, target
        if unit.name in self.units:
            self.measure(full)
        result = reconstruct_weights(self.unit, full, call, target, config, generator)
        if unit.name == self.units[-1]:
            raise Done
        return result

    def measure(self, full: UnitCall) -> None:
        for layer in self.unit.layers():
            layer.weights_enabled = False
        found = {"inherited": self.losses()}
        for way in ("nearest", "closed", "learned", "adaround"):
            choices: Line = {"rounding": "learned" if way == "closed" else way, "round_again": False}
            choices |= {"weight_lr": 1e-2} if way == "adaround" else {}
            config = self.config.changed(choices)
            generator = torch.Generator().manual_seed(config.seed)
            for shift in self.unit.shifts():
                shift.zero_()
            began = time.process_time()
            loss = reconstruct_weights(self.unit, full, self.call, self.target, config, generator).after
            if way == "learned":
                round_last(self.unit, full, self.call, self.target, config, generator, loss)
            seconds = time.process_time() - began
            found[way] = {**self.losses(), "seconds": seconds}
        line = {**self.about, "unit": self.unit.name, "found": found}
        line |= {"iterations": self.config.weights.weight_iterations, "seed": self.config.seed}
        append(self.results, line)
        print(json.dumps(found), flush=True)

    def losses(self) -> Line:
        """The unit's loss on the rows it learns from, on those held out from learning, and on fresh trajectories."""
        seen, held_out = self.unit.split()
        parts = {"seen": seen, "held out": held_out, "fresh": self.fresh}
        return {key: part.loss(self.call, self.target, LOSS_POWER) for key, part in parts.items()}


@click.command()
@click.option("--model", "name", default="reference", help="reference or reference-dit.")
@click.option("--scheme", default="W4A8")
@click.option("--units", default="down_blocks.2.resnets.0,mid_block.attentions.0", help="Names, in execution order.")
@click.option("--set", "settings", multiple=True, help="A choice of preset default, name=value.")
@click.option("--fresh", default=64, help="Trajectories that nothing learns from; a multiple of 8.")
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS)
@click.option("--threads", default=1)
@click.option("--render", is_flag=True, help="Only print the table.")
def main(
    name: str, scheme: str, units: str, settings: tuple[str, ...], fresh: int, results: Path, threads: int, render: bool
) -> None:
    if not render:
        torch.set_num_threads(threads)
        torch.set_flush_denormal(True)
        config = preset("default", scheme=scheme, loss_power=LOSS_POWER, **parse_choices(settings))
        run(config, name, units.split(","), fresh, results)
    print(table(read(results)))


def run(config: Config, name: str, units: list[str], fresh: int, results: Path) -> None:
    model = load_model(name)
    recipe = config.recipe
    calls = collect_cached(model, **recipe)
    other = collect_cached(model, **{**recipe, "samples_per_step": fresh // 8, "thinning": 8, "seed": FRESH_SEED})
    trajectories = int(calls.trajectory.max()) + 1
    about = {"model": name, "scheme": config.scheme, "trajectories": trajectories, "rows": len(calls)}
    plan = make_plan(folded_copy(model.denoiser), config, calls)
    both = Calls.join([calls, other], calls.axis)
    quantized = QuantizedModel.copy_of(model.denoiser, calls.axis, plan.layers)
    both.trajectory[len(calls) :] = 0  # those held out are the last ones of the calibration set
    setattr(engine, "reconstruct_weights", Bench(config, len(calls), units, about, results))  # noqa: B010
    try:
        reconstruct(quantized, both, config, special=plan.special)
    except Done:
        return


def table(lines: list[Line]) -> str:
    """Markdown: loss on seen and on fresh samples, of each way."""
    ways = ("inherited", "nearest", "closed", "learned", "adaround")
    rows = [
        f"| model | unit | scheme | trajectories | {' | '.join(ways)} | iterations per second |",
        f"|{'---|' * (5 + len(ways))}",
    ]
    for line in lines:
        found = line["found"]
        cells = [f"{found[way]['seen']:.4g} / {found[way]['fresh']:.4g}" for way in ways]
        speed = line["iterations"] / max(found["adaround"]["seconds"], 1e-9)
        head = [line["model"], line["unit"], line["scheme"], str(line["trajectories"])]
        rows.append(f"| {' | '.join([*head, *cells, f'{speed:.0f}'])} |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
