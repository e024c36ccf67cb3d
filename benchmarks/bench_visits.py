"""What calibration gains where runs of a block wait at its layers while these are rounded, instead of starting anew.

One JSON line per embedded model: preset ``default``, one thread, CPU seconds of whole calibrations, in which as many
runs wait as the budget holds, or none; both ways take turns in one process. ``passes`` are multiply-accumulates of
layers without gradients, which no other work on the machine changes. Both ways have to give the same tensors.
"""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import click
import torch
from lines import append, read
from torch import Tensor

from ptq_tdq import calibrate, load_model, preset
from ptq_tdq.calib_data import collect
from ptq_tdq.modules import QuantLayer
from ptq_tdq.recon.size import UnitSize

RESULTS = Path(__file__).parent / "results" / "visits.jsonl"
WAYS = {"waiting": UnitSize.waiting, "anew": lambda size, budget: 0}


@click.command()
@click.option("--models", default="reference,reference-dit")
@click.option("--samples-per-step", default=2)
@click.option("--rounds", default=2)
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS)
@click.option("--render", is_flag=True, help="Only print the table.")
def main(models: str, samples_per_step: int, rounds: int, results: Path, render: bool) -> None:
    torch.set_num_threads(1)
    for name in () if render else models.split(","):
        append(
            results, {"model": name, "samples_per_step": samples_per_step, **measure(name, samples_per_step, rounds)}
        )
    print(table(read(results)))


def measure(name: str, samples_per_step: int, rounds: int) -> dict[str, Any]:
    model, config = load_model(name), preset("default", samples_per_step=samples_per_step)
    calls, seconds, passes = collect(model, **config.recipe), dict[str, list[float]](), Counter[str]()
    states: dict[str, dict[str, Tensor]] = {}
    for _ in range(rounds):
        for way, waiting in WAYS.items():
            counted = QuantLayer.forward

            def forward(layer: QuantLayer, x: Tensor, *rest: Any, way: str = way, run: Any = counted) -> Tensor:
                output: Tensor = run(layer, x, *rest)
                if not torch.is_grad_enabled():
                    passes[way] += layer.weight[0].numel() * output.numel()
                return output

            with patch.object(UnitSize, "waiting", waiting), patch.object(QuantLayer, "forward", forward):
                began = time.process_time()
                states[way] = calibrate(model, config, calls).state_dict()
                seconds.setdefault(way, []).append(time.process_time() - began)
    if not all(torch.equal(x, states["anew"][key]) for key, x in states["waiting"].items()):
        raise SystemExit(f"{name}: the two ways differ.")
    ratio = median(b / a for a, b in zip(seconds["waiting"], seconds["anew"], strict=True))
    return {"seconds": {way: median(of) for way, of in seconds.items()}, "ratio": ratio,
            "passes": {way: n // rounds for way, n in passes.items()}}  # fmt: skip


def table(lines: list[dict[str, Any]]) -> str:
    rows = ["| model | waiting (s) | anew (s) | ratio | passes, ratio |", "|---" * 5 + "|"]
    for line in lines:
        seconds, passes = line["seconds"], line["passes"]
        rows.append(
            f"| {line['model']} | {seconds['waiting']:.0f} | {seconds['anew']:.0f} | {line['ratio']:.2f} "
            f"| {passes['anew'] / passes['waiting']:.2f} |"
        )
    return "\n".join(rows)


if __name__ == "__main__":
    main()
