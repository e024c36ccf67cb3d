"""Time and peak memory of calibration against the number of calibration pairs, of blocks and of parameters.

Every point is a run of its own in a child process: a U-Net with random weights, calibrated in few iterations on random
pairs; with series "whole" the U-Net of Stable Diffusion 1.5 and DiT-XL/2, with nothing less. "Own" memory is what the
process itself has allocated (RssAnon, sampled 100 times a second); the largest resident set has the streams in
memory-mapped files in it as well, as far as the system keeps their pages. What python, the libraries and the model
alone need is measured before and given beside it, and what ``--dry-run`` would have said ("forecast"). One JSON line
per point; the figure is drawn from the lines. With ``--work`` a point that was stopped goes on where it was: its CPU
time is then that of its units, each with what came before it, whichever process has finished it.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
from diffusers import DiTTransformer2DModel, UNet2DConditionModel, UNet2DModel
from lines import append, parse_choices, read

from ptq_tdq import calibrate, preset, record
from ptq_tdq.plan import make_plan
from ptq_tdq.quantized_model import QuantizedModel
from ptq_tdq.recon import CACHE_BYTES, UnitReport, make_forecast
from ptq_tdq.wrap import folded_copy

RESULTS = Path(__file__).parent / "results" / "growth.jsonl"
STEPS, SEED = 8, 0  # distinct time steps in a set


@dataclass(frozen=True)
class Point:
    """One model and one set: residual blocks per level (2 levels down, 2 up), channels (c, 2c), size of the images.

    Or a ``model`` by name, in its own configuration.
    """

    series: str
    pairs: int = 64
    blocks: int = 1
    channels: int = 64
    size: int = 8
    model: str = ""


POINTS = (
    *(Point("pairs", pairs=n, channels=32, size=16) for n in (64, 256, 1024, 4096)),
    *(Point("blocks", blocks=n) for n in (1, 2, 4, 8)),
    *(Point("parameters", channels=c, size=8) for c in (32, 64, 128, 256, 352)),
    Point("whole", size=64, model="sd15"),
    Point("whole", size=32, model="dit-xl"),
)
FEW = {"activation_iterations": 4, "batch_size": 16}


def make(point: Point) -> tuple[Any, dict[str, Any]]:
    """A model, and its arguments of all pairs beside x and t."""
    if point.model == "sd15":
        return UNet2DConditionModel(sample_size=64, cross_attention_dim=768), {
            "encoder_hidden_states": torch.randn(point.pairs, 77, 768)
        }
    if point.model == "dit-xl":
        return DiTTransformer2DModel(
            num_attention_heads=16, attention_head_dim=72, in_channels=4, out_channels=8, num_layers=28, sample_size=32,
            activation_fn="gelu-approximate", num_embeds_ada_norm=1000, norm_elementwise_affine=False,
        ), {"class_labels": torch.arange(point.pairs)}  # fmt: skip
    return UNet2DModel(
        sample_size=point.size,
        in_channels=4,
        out_channels=4,
        layers_per_block=point.blocks,
        block_out_channels=(point.channels, 2 * point.channels),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ), {}


def measure(point: Point, few: dict[str, Any], foretell: bool, work: Path | None) -> dict[str, Any]:
    """Calibrate one model in this process, with ``few`` choices that are not the preset's; or ``foretell`` that.

    The state of the run is kept in the folder ``work``.
    """
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    torch.manual_seed(SEED)
    model, others = make(point)
    model.eval().requires_grad_(False)
    x = torch.randn(point.pairs, 4, point.size, point.size)
    t = torch.linspace(0, 999, STEPS).round().repeat(-(-point.pairs // STEPS))[: point.pairs]
    with torch.no_grad(), record(model, num_train_timesteps=1000) as calls:
        for rows in torch.arange(1 if foretell else point.pairs).split(8 if point.model else 64):
            model(x[rows], timestep=t[rows].long(), **{name: value[rows] for name, value in others.items()})
    config = preset("default", scheme="W4A8" if point.model else "W4A6", **(few if point.model else FEW))
    plan = make_plan(folded_copy(model), config, calls)
    quantized = QuantizedModel.copy_of(model, calls.axis, plan.layers)
    foreseen = make_forecast(quantized, calls, config, rows=point.pairs, sampled=0, budget=CACHE_BYTES)
    if foretell:
        return {**asdict(point), "set": few, "forecast": foreseen.to_dict()}
    del quantized
    memory = OwnMemory()
    before = memory.now()
    memory.start()
    log = Log(work and work / "units.jsonl", memory)
    calibrate(model, config, calls, run_directory=work, on_unit=log.add)
    units = log.lines
    return {
        **asdict(point),
        "set": few,
        "units": len(units) // 2,
        "parameters": sum(p.numel() for p in model.parameters()),
        "cpu_seconds": sum(unit["cpu_seconds"] for unit in units),
        "seconds": sum(unit["seconds"] for unit in units),
        "seconds_of_phase": {
            phase: sum(unit["seconds"] for unit in units if unit["phase"] == phase)
            for phase in ("weights", "activations")
        },
        "own_peak_bytes": max(memory.stop(), *(unit["own_peak_bytes"] for unit in units)),
        "own_bytes_before": before,
        "forecast": foreseen.to_dict(),
        "resident_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


class Log:
    """What each unit took since the one before it was finished, in this process or in one that was stopped."""

    def __init__(self, path: Path | None, memory: OwnMemory) -> None:
        self.path, self.memory = path, memory
        self.lines = read(path) if path else []
        self.began = time.process_time(), time.perf_counter()

    def add(self, report: UnitReport) -> None:
        if not report.seconds:  # finished by another process
            return
        now = time.process_time(), time.perf_counter()
        cpu, wall = (b - a for a, b in zip(self.began, now, strict=True))
        self.began = now
        line = {"phase": report.phase, "unit": report.unit, "before": report.before, "after": report.after}
        line |= {"cpu_seconds": cpu, "seconds": wall, "own_peak_bytes": self.memory.peak}
        self.lines.append(line)
        if self.path:
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")


class OwnMemory(threading.Thread):
    """Watches how much memory this process has allocated."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.01):
            self.peak = max(self.peak, self.now())

    def stop(self) -> int:
        """The peak in bytes."""
        self.over.set()
        self.join()
        return self.peak

    @staticmethod
    def now() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


@click.command()
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS)
@click.option("--series", default="pairs,blocks,parameters")
@click.option("--model", help="Of series whole, this one alone: sd15, dit-xl.")
@click.option("--render", is_flag=True, help="Only draw the figure.")
@click.option("--foretell", is_flag=True, help="Only print the forecasts.")
@click.option("--set", "choices", multiple=True, help="A choice of series whole, name=value.")
@click.option("--work", type=click.Path(path_type=Path), help="A folder for unfinished points of series whole.")
@click.option("--child", help="A point as JSON; for the child processes.")
def main(
    results: Path,
    series: str,
    model: str | None,
    render: bool,
    foretell: bool,
    choices: tuple[str, ...],
    work: Path | None,
    child: str | None,
) -> None:
    few = parse_choices(choices)
    if child:
        print(json.dumps(measure(Point(**json.loads(child)), few, foretell, work)))
        return
    wanted = [p for p in POINTS if p.series in series.split(",") and model in (None, p.model)]
    if foretell:
        for point in wanted:
            print(json.dumps(measure(point, few, True, None)), flush=True)
        return
    lines = read(results)
    known = {key(line) for line in lines}
    for point in wanted:
        if render or key({**asdict(point), "set": few}) in known:
            continue
        given = [f"--set={choice}" for choice in choices]
        if work and point.model:
            given.append(f"--work={work / point.model}")
        run = [sys.executable, __file__, "--child", json.dumps(asdict(point)), *given]
        found = subprocess.run(run, capture_output=True, text=True, check=False)
        if found.returncode:
            sys.exit(f"{point} failed:\n{found.stderr}")
        print(found.stdout, flush=True)
        lines.append(append(results, {**json.loads(found.stdout), "facts": {"threads": 1}}))
    draw(lines, results.with_suffix(".svg"))


def key(line: dict[str, Any]) -> tuple[Any, ...]:
    names = ("series", "pairs", "blocks", "channels", "size", "model")
    return *(line.get(name, "") for name in names), str(line.get("set") or {})


def draw(lines: list[dict[str, Any]], path: Path) -> None:
    """CPU time above, memory below, one column for each series; the dotted lines grow in proportion to x."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "growth"  # the same bytes from the same lines
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator, NullLocator

    axes_of = {"pairs": "calibration pairs", "blocks": "reconstruction units", "parameters": "parameters (millions)"}
    figure, axes = pyplot.subplots(2, 3, figsize=(10, 5.6), sharex="col", layout="constrained")
    for column, (series, label) in enumerate(axes_of.items()):
        here = [line for line in lines if line["series"] == series]
        if not here:
            continue
        divide = 1e6 if series == "parameters" else 1
        x = [line["units" if series == "blocks" else series] / divide for line in here]
        memory = [(line["own_peak_bytes"] - line["own_bytes_before"]) / 2**20 for line in here]
        for ax, values, color in (
            (axes[0, column], [line["cpu_seconds"] for line in here], "tab:blue"),
            (axes[1, column], memory, "tab:red"),
        ):
            ax.loglog(x, values, "o-", color=color)
            ax.loglog(x, [values[-1] * v / x[-1] for v in x], ":", color="gray", label="in proportion")
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.yaxis.set_major_formatter("{x:g}")
            ax.yaxis.set_minor_locator(NullLocator())
            ax.grid(alpha=0.3)
        axes[1, column].set_xlabel(label)
        axes[1, column].set_xticks(x, [f"{v:.2g}" if v < 100 else f"{v:.0f}" for v in x])
        axes[1, column].xaxis.set_minor_locator(NullLocator())
    axes[0, 0].set_ylabel("CPU time (s), one thread")
    axes[1, 0].set_ylabel("memory beyond the model's (MiB)")
    axes[0, 0].legend()
    figure.suptitle("Calibration, preset default at W4A6 with 4 iterations: growth")
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
