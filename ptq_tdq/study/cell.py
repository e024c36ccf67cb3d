"""One cell: calibrate with its choices, on shared weights, and measure the result."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ptq_tdq.artifacts import summarize
from ptq_tdq.atomic import write_atomic
from ptq_tdq.calib_data import LoadedModel, collect, collect_cached
from ptq_tdq.calibration import calibrate, identity, provenance, weight_identity
from ptq_tdq.calls import Calls
from ptq_tdq.config import Config
from ptq_tdq.errors import NonFiniteError
from ptq_tdq.evaluate.baseline import Baseline, load_baseline, make_baseline, save_baseline
from ptq_tdq.evaluate.images import grid_png
from ptq_tdq.evaluate.ptqd import corrected
from ptq_tdq.load import load_quantized
from ptq_tdq.plan import make_plan
from ptq_tdq.quantized_model import QuantizedModel
from ptq_tdq.recon import UnitReport
from ptq_tdq.study.matrix import FULL_PRECISION, Cell
from ptq_tdq.wrap import folded_copy

Say = Callable[[str], None]
SHOWN = 30  # samples of a picture


def run_cell(model: LoadedModel, cell: Cell, work: Path, say: Say, *, grids: Path | None) -> dict[str, Any]:
    """What the cell's line says, but for the facts of the machine.

    ``work`` keeps what cells share (weights, full-precision samples) and the cell's own unfinished state; ``grids``
    gets a picture of its first samples. A calibration that diverges is a result, not an error: its line has "failed"
    instead of "results".
    """
    line, began = cell_line(model, cell), time.perf_counter()
    baseline = _baseline(model, cell, work, say)
    if cell.method == FULL_PRECISION:
        return {**line, "results": baseline.quality(), "seconds": {"evaluation": time.perf_counter() - began}}
    say("calibration set")
    calls = collect_cached(model, **cell.config.recipe)
    try:
        return {**line, **_measure(model, cell, baseline, calls, work, say, grids)}
    except NonFiniteError as error:
        return {**line, "failed": str(error), "results": {}, "seconds": {}}


def cell_line(model: LoadedModel, cell: Cell) -> dict[str, Any]:
    """What the cell's line says before it is measured."""
    line: dict[str, Any] = {
        "preset": cell.preset,
        "scheme": cell.scheme,
        "method": cell.method,
        "seed": cell.seed,
        "evaluation": cell.evaluation,
        "model": model.id,
        "model_sha256": model.sha256,
        "sampling_sha256": sampling_sha256(model),
    }
    return line if cell.method == FULL_PRECISION else {**line, "choices": cell.choices}


def sampling_sha256(model: LoadedModel) -> str:
    """A name for what is sampled and how: prompts or classes, the pipeline's arguments, dtype."""
    return _name({**model.sampler.recipe(), "dtype": str(model.denoiser.dtype)})


def check_plans(model: LoadedModel, configs: Sequence[Config]) -> None:
    """Plan the model with each of ``configs``, so that a bad choice is known before hours of work.

    Raises :class:`~ptq_tdq.errors.ModelError` for a skip pattern that matches nothing, or when no layer is left.
    """
    copied, calls = folded_copy(model.denoiser), dict[int, Calls]()
    for config in configs:
        steps = config.calibration.num_inference_steps
        if steps not in calls:  # two samples are enough to see the model's structure
            few = min(2, steps)
            calls[steps] = collect(model, samples_per_step=2, calibration_steps=few, num_inference_steps=steps)
        make_plan(copied, config, calls[steps])


def _measure(
    model: LoadedModel,
    cell: Cell,
    baseline: Baseline,
    calls: Calls,
    work: Path,
    say: Say,
    grids: Path | None,
) -> dict[str, Any]:
    seconds = {"weights": 0.0, "activations": 0.0}
    loss = {"weights": 0.0, "activations": 0.0}
    began = time.perf_counter()

    def on_unit(report: UnitReport) -> None:
        nonlocal began
        now = time.perf_counter()  # with the sweep between the units, unlike the report's own seconds
        seconds[report.phase] += now - began
        began = now
        loss[report.phase] += report.after
        say(f"{report.phase} {report.index + 1}/{report.total}")

    document = provenance(model, cell.config, calls)
    own = work / f"cell-{_name(identity(document))}"
    quantized = calibrate(
        model,
        cell.config,
        calls,
        run_directory=own,
        weights_directory=work / f"weights-{_name(weight_identity(document, cell.config))}",
        on_unit=on_unit,
    )
    began = time.perf_counter()
    denoiser = corrected(cell.correction, model, _executable(quantized, cell, own), calls)
    measured = baseline.measure(denoiser, lambda done, total: say(f"samples {done}/{total}"))
    seconds["evaluation"] = time.perf_counter() - began
    if grids and measured.images is not None and baseline.images is not None:
        panels = {"full precision": baseline.images, f"{cell.preset} {cell.scheme} {cell.method}": measured.images}
        picture = grid_png(panels, baseline.reference.conditions, SHOWN)
        write_atomic(grids / f"{_file_name(cell)}.png", picture)
    shutil.rmtree(own, ignore_errors=True)
    size = {"mean_bits": quantized.metrics["mean_bits"], "bytes": summarize(quantized.to_artifact())["bytes"]}
    return {"results": measured.results, "size": size, "loss": loss, "seconds": seconds}


def _executable(quantized: QuantizedModel, cell: Cell, folder: Path) -> nn.Module:
    """The model in the form of the cell's backend."""
    if cell.runs_on == "simulated":
        return quantized
    quantized.save_pretrained(folder / "artifact", overwrite=True)
    return load_quantized(folder / "artifact", backend=cell.runs_on)


def _file_name(cell: Cell) -> str:
    """PRESET-SCHEME-METHOD-SEED-STEPS in letters that every file system has."""
    return re.sub(
        r"[^\w.]+", "-", "-".join(map(str, (*cell.key, f"{cell.config.calibration.num_inference_steps}steps")))
    )


def _baseline(model: LoadedModel, cell: Cell, work: Path, say: Say) -> Baseline:
    """The full-precision side, from ``work`` if another cell has made it."""
    folder = work / f"baseline-{_name({**cell.evaluation, 'model': model.sha256})}"
    found = load_baseline(folder, model, **cell.evaluation)
    if found is None:
        found = make_baseline(
            model, **cell.evaluation, on_progress=lambda done, total: say(f"full precision {done}/{total}")
        )
        save_baseline(folder, found)
    return found


def _name(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
