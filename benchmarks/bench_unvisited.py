"""What each method is worth at time steps that calibration did not visit, beside those that it did.

Units of the embedded model learn their intervals from every other step of the calibration set, on full-precision
inputs and with 8-bit weights rounded to nearest, so that nothing but the intervals differs. Their loss is taken on
trajectories that are held out. One JSON line per unit and method is appended; ``--render`` prints the means over units,
in dB against S_1 at the same steps: a table that jumps between visited steps gains at these and loses at the others.
"""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import click
import torch
from lines import append, read

from ptq_tdq import load_model, preset
from ptq_tdq.calib_data import collect_cached
from ptq_tdq.config import Config
from ptq_tdq.plan import make_plan
from ptq_tdq.quantized_model import QuantizedModel
from ptq_tdq.recon import CACHE_BYTES, activations, engine, weights
from ptq_tdq.recon.parts import Parts
from ptq_tdq.recon.streams import UnitCall
from ptq_tdq.recon.unit import Unit
from ptq_tdq.wrap import folded_copy

RESULTS = Path(__file__).parent / "results" / "unvisited.jsonl"
BASELINE = "static"
METHODS = f"{BASELINE},S_10,step-table,step-lsq,tdq-thin,tdq"


class Finished(Exception):
    """All chosen units have learned."""


class Bench(engine._Engine):
    """The engine's sweep, in which only some units learn: each method in turn."""

    def __init__(
        self, quantized: QuantizedModel, calls: Any, config: Config, units: list[str], methods: list[str]
    ) -> None:
        super().__init__(quantized, calls, config, engine.ORDINARY, None, CACHE_BYTES, lambda report: None)
        self.chosen, self.methods, self.lines = units, methods, list[dict[str, Any]]()

    def learn(self, phase: str, index: int, unit: Unit, full: UnitCall, mine: UnitCall, target: Parts) -> None:
        if unit.name not in self.chosen:
            return
        for layer in unit.layers():
            weights.initialize(layer, self.config)
            layer.weights_enabled = True
        held_out = unit.held_out
        assert held_out is not None
        visited = torch.isin(unit.t, unit.t.unique()[::2])
        records = [quantizer.record for quantizer in unit.quantizers()]
        first = [shift.detach().clone() for shift in unit.shifts()]
        for method in self.methods:
            for quantizer, record in zip(unit.quantizers(), records, strict=True):
                quantizer.record, quantizer.enabled = replace(record, method=method, gain_db=None), False
            unit.set_shifts(first)
            torch.manual_seed(0)
            learning = replace(unit, among=visited & ~held_out, held_out=None)
            generator, steps = torch.Generator().manual_seed(0), self.calls.axis.num_train_timesteps
            activations.reconstruct_activations(learning, full, full, target, self.config, generator, steps)
            line: dict[str, Any] = {"unit": unit.name, "method": method}
            for name, rows in (("visited", visited), ("unvisited", ~visited)):
                judge = replace(unit, among=rows & held_out)
                line[name] = judge.loss(full, target, self.config.activations.loss_power)
            self.lines.append(line)
            print(line, flush=True)
        if {line["unit"] for line in self.lines} == set(self.chosen):
            raise Finished


@click.command()
@click.option("--units", default="down_blocks.0.resnets.0", help="Names, separated by commas.")
@click.option("--methods", default=METHODS)
@click.option("--scheme", default="W8A5")
@click.option("--samples", default=16, type=click.IntRange(min=8), help="Of each step; one in 8 is held out.")
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS)
@click.option("--render", is_flag=True, help="Only print the table.")
def main(units: str, methods: str, scheme: str, samples: int, results: Path, render: bool) -> None:
    if not render:
        torch.set_num_threads(1)
        choices = {"scheme": scheme, "rounding": "nearest", "thinning": 1, "samples_per_step": samples, "bias_lr": 0.0}
        config = preset("default", method=BASELINE, **choices)
        model = load_model()
        calls = collect_cached(model, **config.recipe)
        plan = make_plan(folded_copy(model.denoiser), config, calls)
        quantized = QuantizedModel.copy_of(model.denoiser, calls.axis, plan.layers)
        bench = Bench(quantized, calls, config, units.split(","), methods.split(","))
        with suppress(Finished):
            bench.pass_over("activations")
        for line in bench.lines:
            append(results, line | {"choices": config.to_dict()})
    print(table(read(results)))


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown: the mean gain over S_1 at visited and at unvisited steps."""
    static = {line["unit"]: line for line in lines if line["method"] == BASELINE}
    rows = ["| method | visited steps, dB | unvisited steps, dB |", "|---|---:|---:|"]
    for method in dict.fromkeys(line["method"] for line in lines):
        mine = [line for line in lines if line["method"] == method and line["unit"] in static]
        gains = [
            mean(10 * math.log10(static[line["unit"]][key] / line[key]) for line in mine)
            for key in ("visited", "unvisited")
        ]
        rows.append(f"| `{method}` | {gains[0]:+.2f} | {gains[1]:+.2f} |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
