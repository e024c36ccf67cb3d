"""Transformers: what intervals of tokens, ratios of t, equalization and rotation keep, at several bit widths.

Each ``--methods`` entry is an interval source, with further choices of preset ``default`` behind it
("static:equalize=channels"). An embedded model is calibrated with each at each of ``--schemes`` and sampled from the
noise of evaluation: SQNR in dB of the predictions, a mean over the steps of the full-precision trajectory, and of the
final latents, both against full precision. Runs of one weight width share phase W where the choices allow it. One JSON
line per run, with the reconstruction losses summed over the units and wall seconds; runs that are in the file already
are left out. ``--render`` prints a table for each group of settings.
"""

from __future__ import annotations

import json
import tempfile
import time
from hashlib import sha256
from pathlib import Path

import click
import torch
from lines import Line, append, parse_choices, read

from ptq_tdq import calibrate, load_model, preset
from ptq_tdq.calib_data import LoadedModel, collect_cached
from ptq_tdq.config import Config
from ptq_tdq.evaluate.trajectories import Reference, compare, make_reference

RESULTS = Path(__file__).parent / "results" / "tokens.jsonl"
SCHEMES = "W8A8,W8A6,W8A4,W4A8,W4A6,W4A4"
METHODS = (
    "static,S_20,step-table,tdq-thin,dynamic,dynamic-token,dynamic-token-static,dynamic-token-table,dynamic-token-tdq,"
    "static:equalize=channels,static:rotate=hadamard,tdq-thin:rotate=hadamard,dynamic-token:rotate=hadamard"
)


def choices_of(entry: str) -> Line:
    """An entry of ``--methods`` as choices."""
    method, *others = entry.split(":")
    return {"method": method, **parse_choices(others)}


def measure(model: LoadedModel, config: Config, reference: Reference, work: Path) -> Line:
    """Calibrate with ``config``, and compare with the reference."""
    calls = collect_cached(model, **config.recipe)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        shared = work / sha256(json.dumps(config.weight_choices, sort_keys=True).encode()).hexdigest()[:16]
        quantized = calibrate(model, config, calls, run_directory=Path(folder), weights_directory=shared)
    seconds = time.perf_counter() - began
    found = compare(reference, quantized)
    losses = {phase: sum(u["after"] for u in units) for phase, units in quantized.metrics["reconstruction"].items()}
    divided = [layer.divisor for layer in quantized.layers().values() if layer.divisor is not None]
    return {
        "latent_sqnr_db": found.latent_sqnr_db, "prediction_sqnr_db": found.mean_noise_sqnr_db, "losses": losses,
        "equalized_layers": len(divided), "seconds": seconds,
    }  # fmt: skip


@click.command()
@click.option("--model", "source", default="reference-dit")
@click.option("--schemes", default=SCHEMES)
@click.option("--methods", default=METHODS)
@click.option("--seeds", default="0")
@click.option("--set", "settings", multiple=True, help="A choice of all runs, name=value.")
@click.option("--samples", default=64)
@click.option("--steps", default=20)
@click.option("--device", default="cpu")
@click.option("--minutes", default=60.0, help="Begin no run after so many minutes.")
@click.option("--work", type=click.Path(path_type=Path), help="Folder for shared weight phases; else a temporary one.")
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS)
@click.option("--threads", default=1)
@click.option("--render", is_flag=True, help="Only print the table.")
def main(
    source: str, schemes: str, methods: str, seeds: str, settings: tuple[str, ...], samples: int, steps: int,
    device: str, minutes: float, work: Path | None, results: Path, threads: int, render: bool,
) -> None:  # fmt: skip
    lines = read(results)
    if not render:
        deadline = time.monotonic() + 60 * minutes
        torch.set_num_threads(threads)
        torch.set_flush_denormal(True)
        model = load_model(source, device=device)
        reference = make_reference(model, samples=samples, num_inference_steps=steps, seed=0)
        with tempfile.TemporaryDirectory() as folder:
            for seed, scheme, entry in (
                (s, c, m) for s in seeds.split(",") for c in schemes.split(",") for m in methods.split(",")
            ):
                about = {
                    "model": source, "sha256": model.sha256, "scheme": scheme, "method": entry, "seed": int(seed),
                    "settings": list(settings), "samples": samples, "steps": steps,
                }  # fmt: skip
                if time.monotonic() > deadline or any(about.items() <= line.items() for line in lines):
                    continue
                common: Line = {"seed": seed, "scheme": scheme, **parse_choices(settings)}
                config = preset("default", **common | choices_of(entry))
                found = measure(model, config, reference, work or Path(folder))
                lines.append(append(results, {**about, **found, "device": device}))
                print(scheme, entry, {k: v for k, v in found.items() if k != "losses"}, flush=True)
    print(table(lines))


def table(lines: list[Line]) -> str:
    """Markdown: final latents / predictions in dB, means over the seeds; a table for each group of settings."""
    groups: dict[str, list[Line]] = {}
    for line in lines:
        title = ", ".join([*line["settings"], f"{line['samples']} samples", f"{line['steps']} steps"])
        groups.setdefault(title, []).append(line)
    return "\n\n".join(f"{title}\n\n{grid(found)}" for title, found in groups.items())


def grid(lines: list[Line]) -> str:
    schemes, methods = (list(dict.fromkeys(line[key] for line in lines)) for key in ("scheme", "method"))
    rows = [f"| | {' | '.join(schemes)} |", "|---" * (len(schemes) + 1) + "|"]
    for method in methods:
        cells = [[x for x in lines if (x["scheme"], x["method"]) == (scheme, method)] for scheme in schemes]
        rows.append(f"| {method} | {' | '.join(map(cell, cells))} |")
    return "\n".join(rows)


def cell(lines: list[Line]) -> str:
    values = [[line[key] for line in lines] for key in ("latent_sqnr_db", "prediction_sqnr_db")]
    return " / ".join(f"{sum(v) / len(v):.1f}" for v in values) if lines else ""


if __name__ == "__main__":
    main()
