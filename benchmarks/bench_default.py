"""Preset ``default`` against S_1 of the same preset: SQNR of predicted noise and of final latents, several seeds.

Both methods share the weight phase of their seed. One JSON line per (scheme, method, seed) is appended to
``--results``; finished cells are not run again. ``--render`` prints the table from the lines alone.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import click
import torch
from facts import facts

from ptq_tdq import calibrate, load_model, preset
from ptq_tdq.calib_data import collect_cached
from ptq_tdq.evaluate.trajectories import Reference, compare, make_reference

RESULTS = Path(__file__).parent / "results" / "default.jsonl"
COLLECT = ("samples_per_step", "calibration_steps", "num_inference_steps", "step_distribution", "seed")
EVALUATION_SEED, EVALUATION_SAMPLES = 12345, 64


@click.command()
@click.option("--schemes", default="W8A6,W4A6")
@click.option("--methods", default="static,tdq-thin")
@click.option("--seeds", default="0,1,2")
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS)
@click.option("--threads", default=2)
@click.option("--render", is_flag=True, help="Only print the table.")
def main(schemes: str, methods: str, seeds: str, results: Path, threads: int, render: bool) -> None:
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    lines = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    if not render:
        model = load_model()
        reference = make_reference(model, samples=EVALUATION_SAMPLES, num_inference_steps=25, seed=EVALUATION_SEED)
        known = {(line["scheme"], line["method"], line["seed"]) for line in lines}
        results.parent.mkdir(exist_ok=True)
        for scheme in schemes.split(","):
            for seed in map(int, seeds.split(",")):
                with tempfile.TemporaryDirectory() as folder:
                    for method in methods.split(","):
                        if (scheme, method, seed) not in known:
                            cell = run(model, reference, scheme, method, seed, Path(folder))
                            lines.append(cell)
                            with results.open("a") as file:
                                file.write(json.dumps(cell) + "\n")
    print(table(lines))


def run(model: Any, reference: Reference, scheme: str, method: str, seed: int, folder: Path) -> dict[str, Any]:
    """One cell; the weight phase is kept in ``folder`` for the next method."""
    name, _, change = method.partition(":")  # "tdq-thin:module_start=static" is an ablation
    choices = dict(pair.split("=") for pair in change.split("+") if pair)
    config = preset("default", scheme=scheme, method=name, seed=seed, **choices)
    calibration_set = collect_cached(model, **{key: getattr(config, key) for key in COLLECT})
    own = folder / method
    own.mkdir()
    for file in folder.glob("*/weights-*.safetensors"):
        if not (own / file.name).exists():
            shutil.copy(file, own)
    seconds: dict[str, float] = {"weights": 0.0, "activations": 0.0}
    loss: dict[str, float] = {"weights": 0.0, "activations": 0.0}

    def on_unit(report: Any) -> None:
        seconds[report.phase] += report.seconds
        loss[report.phase] += report.after

    quantized = calibrate(model.unet, config, calibration_set, model_id=model.id, run_directory=own, on_unit=on_unit)
    found = compare(reference, quantized, EVALUATION_SEED)
    beside: dict[str, float] = {}
    if method == "static":  # the same weights without learned intervals, and without activation quantization
        with quantized.intervals(quantized.static):
            beside["static_mse_latent_sqnr_db"] = compare(reference, quantized, EVALUATION_SEED).latent_sqnr_db
        quantized.quantize(weights=True, activations=False)
        beside["weights_only_latent_sqnr_db"] = compare(reference, quantized, EVALUATION_SEED).latent_sqnr_db
    return {
        "scheme": scheme,
        "method": method,
        "seed": seed,
        "latent_sqnr_db": found.latent_sqnr_db,
        "mean_noise_sqnr_db": found.mean_noise_sqnr_db,
        "noise_sqnr_db": found.noise_sqnr_db,
        **beside,
        "loss": loss,
        "seconds": seconds,
        "choices": config.to_dict(),
        "model_sha256": model.sha256,
        "evaluation": {"samples": EVALUATION_SAMPLES, "seed": EVALUATION_SEED, "num_inference_steps": 25},
        "facts": facts(),
    }


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown: mean and deviation over seeds, and each seed's difference to S_1."""
    rows = [
        "| scheme | method | final latents (dB) | against S_1, each seed | predicted noise, mean over t (dB) |",
        "|---|---|---|---|---|",
    ]
    for scheme in dict.fromkeys(line["scheme"] for line in lines):
        here = [line for line in lines if line["scheme"] == scheme]
        base = {line["seed"]: line["latent_sqnr_db"] for line in here if line["method"] == "static"}
        for method in dict.fromkeys(line["method"] for line in here):
            cells = sorted((c for c in here if c["method"] == method), key=lambda c: int(c["seed"]))
            gains = [f"{c['latent_sqnr_db'] - base[c['seed']]:+.2f}" for c in cells if c["seed"] in base]
            latents, noise = ([c[key] for c in cells] for key in ("latent_sqnr_db", "mean_noise_sqnr_db"))
            rows.append(f"| {scheme} | {method} | {spread(latents)} | {', '.join(gains)} | {spread(noise)} |")
    return "\n".join(rows)


def spread(values: list[float]) -> str:
    """Mean and sample deviation."""
    return f"{mean(values):.2f} ± {stdev(values):.2f}" if len(values) > 1 else f"{mean(values):.2f}"


if __name__ == "__main__":
    main()
