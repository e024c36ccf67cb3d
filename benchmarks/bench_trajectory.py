"""A last pass over all intervals at once, on errors accumulated along short trajectories instead of single blocks.

A model calibrated with preset ``default`` is run for a few steps of its sampler from points of full-precision
trajectories; the distance of where it ends from where full precision ends, relative to the latter, is the loss. Each
activation quantizer learns a gain of its scales, linear in t between knots (in log; codes of the zero points stay).
Measured before and after, on trajectories of another seed. One JSON line per seed.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from statistics import mean
from typing import Any

import click
import torch
from facts import facts
from paired import paired
from torch import Tensor, nn

from ptq_tdq import calibrate, load_model, preset
from ptq_tdq.calib_data import collect_cached
from ptq_tdq.calib_data.sampling import start_schedule
from ptq_tdq.config import COLLECT_CHOICES
from ptq_tdq.evaluate.trajectories import Reference, compare, make_reference
from ptq_tdq.intervals.table import TableSource
from ptq_tdq.quantized_model import QuantizedModel

RESULTS = Path(__file__).parent / "results" / "trajectory.jsonl"
STEPS = 20
LEARNED, MEASURED = 64, 200  # trajectories
OTHER_SEED = 1000  # added for the trajectories that are learned from


class Gained(TableSource):
    """A finished table whose scales are multiplied by a learned gain, linear in t between ``knots``."""

    def __init__(self, table: TableSource, knots: int) -> None:
        super().__init__(table.scale, table.zero_point)
        self.log_gain = nn.Parameter(torch.zeros(knots))

    def forward(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        scale, zero_point = super().forward(t, x)
        place = t.float() / len(self.scale) * (len(self.log_gain) - 1)
        low = place.floor().long().clamp(max=len(self.log_gain) - 2)
        return scale * torch.lerp(self.log_gain[low], self.log_gain[low + 1], place - low).exp(), zero_point


def learn(
    quantized: QuantizedModel, reference: Reference, seed: int, iterations: int, length: int, batch: int, rate: float,
    knots: int,
) -> list[float]:  # fmt: skip
    """Tune the quantizers' scales in place; returns the loss of each iteration."""
    quantizers = [q for q in quantized.quantizers().values() if isinstance(q.source, TableSource)]
    gains = []
    for quantizer in quantizers:
        assert isinstance(quantizer.source, TableSource)
        quantizer.source = Gained(quantizer.source, knots)
        gains.append(quantizer.source.log_gain)
    optimizer = torch.optim.Adam(gains, lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    scheduler, generator = start_schedule(reference.model.scheduler, STEPS), torch.Generator().manual_seed(seed)
    points, losses = (*reference.x, reference.latents), []
    for _ in range(iterations):
        begin = int(torch.randint(STEPS - length + 1, (), generator=generator))
        some = torch.randint(len(points[0]), (batch,), generator=generator)
        labels = {key: value[some] for key, value in reference.labels().items()}
        x, end = points[begin][some], points[begin + length][some]
        with torch.enable_grad():
            for t in scheduler.timesteps[begin : begin + length]:
                with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
                    prediction = quantized(x, t, **labels).sample
                x = scheduler.step(prediction.float(), t, x).prev_sample
            loss = (x - end).square().mean() / end.square().mean()
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def measure(
    scheme: str, seed: int, iterations: int, length: int, batch: int, rate: float, knots: int
) -> dict[str, Any]:
    """Calibrate, tune, and measure both."""
    model = load_model()
    config = preset("default", scheme=scheme, seed=seed, num_inference_steps=STEPS, calibration_steps=STEPS)
    quantized = calibrate(
        model.unet, config, collect_cached(model, **{key: getattr(config, key) for key in COLLECT_CHOICES})
    )
    reference = make_reference(model, samples=MEASURED, num_inference_steps=STEPS, seed=seed)
    before = compare(reference, quantized, seed)
    known = make_reference(model, samples=LEARNED, num_inference_steps=STEPS, seed=seed + OTHER_SEED)
    began = time.process_time()
    losses = learn(quantized, known, seed, iterations, length, batch, rate, knots)
    seconds = time.process_time() - began
    quarter = -(-len(losses) // 4)
    return {
        "scheme": scheme, "seed": seed, "iterations": iterations, "length": length, "batch": batch, "rate": rate,
        "knots": knots, "before": before.to_dict(), "after": compare(reference, quantized, seed).to_dict(),
        "first_losses": mean(losses[:quarter]), "last_losses": mean(losses[-quarter:]),
        "cpu_seconds": seconds, "facts": facts(),
    }  # fmt: skip


@click.command()
@click.option("--scheme", default="W4A4")
@click.option("--seeds", default="0,1,2", help="Comma-separated.")
@click.option("--iterations", default=100)
@click.option("--length", default=4, help="Steps of a short trajectory.")
@click.option("--batch", default=16)
@click.option("--rate", default=2e-3, help="Learning rate of the logarithm of a gain.")
@click.option("--knots", default=5)
@click.option("--threads", default=1)
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS)
@click.option("--render", is_flag=True, help="Only print the table.")
def main(seeds: str, threads: int, results: Path, render: bool, **choices: Any) -> None:
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    for seed in () if render else map(int, seeds.split(",")):
        line = measure(seed=seed, **choices)
        with results.open("a") as file:
            file.write(json.dumps(line) + "\n")
    print(paired([json.loads(line) for line in results.read_text().splitlines()], ("scheme", "length")))


if __name__ == "__main__":
    main()
