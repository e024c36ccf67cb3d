"""``ptq-tdq evaluate``: what a quantized model loses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from rich.table import Table
from torch import Tensor, nn

from ptq_tdq.artifacts import check_base_model, read_artifact
from ptq_tdq.atomic import Contents, check_target, publish_directory, write_file
from ptq_tdq.calib_data import LoadedModel, collect_cached, make_recipe, with_scheduler
from ptq_tdq.cli.options import (
    FilePath,
    backend_option,
    json_option,
    original_options,
    print_json,
    quiet_option,
    refuse_inside,
    result_console,
    scheduler_option,
    seed_option,
    steps_option,
    threads_option,
    verbose_option,
)
from ptq_tdq.cli.original import load_original, quiet_schedulers
from ptq_tdq.cli.progress import Progress
from ptq_tdq.errors import UsageError
from ptq_tdq.evaluate import inception
from ptq_tdq.evaluate.baseline import Baseline, Evaluation, make_baseline
from ptq_tdq.evaluate.images import grid_png
from ptq_tdq.evaluate.names import METRICS, Metric
from ptq_tdq.evaluate.ptqd import CorrectionName, corrected
from ptq_tdq.load import Backend, load_quantized

GRID_IMAGES = 40
_DOCUMENT, _TABLE, _PICTURE = "evaluation.json", "evaluation.md", "samples.png"
_CONTENTS = Contents("an evaluation", (_DOCUMENT, _TABLE, _PICTURE))
SAMPLES, PIPELINE_SAMPLES = 1000, 32  # of a plain loop over a small denoiser, and of a pipeline
FIXED = "First part: the quantized model compared with full precision from the same noise"
DATA = (
    "Below the line: compared with CIFAR-10 training images in the features of the embedded classifier "
    "(FD: the statistics of all 50,000; KID, precision and recall: the features of 1,000)"
)
INCEPTION = "Inception metrics compare with the images of --data"
NO_CLASSIFIER = (
    "This is no embedded model, so there is no classifier to compare its samples with data: only the distances to full "
    "precision are given; --data adds Inception metrics."
)
NO_IMAGES = (
    "The samples are no images (sounds, or latents without a VAE), so only predictions and final latents are compared."
)


@click.command("evaluate")
@click.argument("artifact", type=FilePath())
@original_options
@click.option(
    "--samples",
    type=click.IntRange(8, 1 << 20),
    help="Samples of each model; distances to data depend on it, compare them at one number only.  "
    f"[default: {SAMPLES}; {PIPELINE_SAMPLES} with a pipeline]",
)
@steps_option
@scheduler_option
@backend_option
@click.option(
    "--correction",
    type=click.Choice(["none", "ptqd"]),
    default="none",
    show_default=True,
    help="ptqd: undo mean and gain of the errors, estimated on the artifact's calibration set.",
)
@seed_option
@click.option(
    "--data",
    type=FilePath(),
    help="A folder of real images: adds Inception FID, sFID and IS (extra: fidelity).",
)
@click.option("--output-dir", type=FilePath(), help=f"Also write {_DOCUMENT}, {_TABLE} and {_PICTURE}.")
@click.option("--overwrite", is_flag=True, help="Replace an output directory that is already there.")
@threads_option
@json_option
@verbose_option
@quiet_option
def evaluate_command(
    artifact: Path,
    source: str | None,
    samples: int | None,
    num_inference_steps: int,
    scheduler: str | None,
    backend: Backend,
    correction: CorrectionName,
    seed: int,
    data: Path | None,
    output_dir: Path | None,
    overwrite: bool,
    as_json: bool,
    verbose: bool,
    quiet: bool,
    **given: Any,
) -> None:
    """Measure what ARTIFACT loses against its full-precision model.

    Both sample from the same noise what calibration sampled (prompts or classes, the pipeline's arguments), or what is
    named here. Distances between the two are given for every model; for an embedded model also the distances of each
    to its training images, in the features of the embedded classifier (-C10, no FID).
    """
    quiet_schedulers()
    if output_dir:
        refuse_inside(output_dir, [artifact])
        check_target(output_dir, _CONTENTS if overwrite else None)
    stored = read_artifact(artifact)
    model = load_original(source, stored, **given)
    check_base_model(stored, model.sha256)
    quantized = load_quantized(artifact, backend=backend, device=given["device"])
    denoiser = _corrected(correction, model, quantized, stored.config)
    if scheduler:
        model = with_scheduler(model, scheduler)
    samples = samples or (PIPELINE_SAMPLES if model.sampler.batch < PIPELINE_SAMPLES else SAMPLES)
    say = Progress(quiet=quiet, verbose=verbose)
    network, real = (inception.load_inception(), inception.find_real(data)) if data else (None, [])
    baseline = make_baseline(
        model,
        samples=samples,
        num_inference_steps=num_inference_steps,
        seed=seed,
        on_progress=lambda done, total: say.counting("Sampling with full precision", done, total),
    )
    described = _real(network, real, baseline)
    measured = baseline.measure(
        denoiser,
        lambda done, total: say.counting("Sampling with the quantized model", done, total),
    )
    document = {
        "artifact": str(artifact),
        **{key: stored.config[key] for key in ("scheme", "method", "preset")},
        **_about(model),
        "backend": backend,
        "correction": correction,
        "samples": samples,
        "steps_compared_on": baseline.reference.recorded,
        "num_inference_steps": num_inference_steps,
        "seed": seed,
        "compared_with": _notes(baseline, network),
        "full_precision": baseline.quality() | _inception(network, baseline.images, described),
        "quantized": measured.results | _inception(network, measured.images, described),
    }
    if output_dir:
        _write(output_dir, document, baseline, measured, overwrite)
    if as_json:
        print_json(document)
    elif not quiet:
        _show(document)
        if output_dir:
            click.echo(f"Wrote {output_dir}")


def _about(model: LoadedModel) -> dict[str, Any]:
    """What full precision is, and how it samples."""
    return {
        "model": {"id": model.id, "sha256": model.sha256},
        "sampling": model.sampler.recipe(),
        "scheduler": type(model.scheduler).__name__,
    }


def _corrected(name: CorrectionName, model: LoadedModel, quantized: nn.Module, config: dict[str, Any]) -> nn.Module:
    """The model with its correction, estimated on the artifact's calibration set.

    Raises :class:`UsageError` where that cannot be sampled again: of recorded calls, or of another sampler.
    """
    if name == "none":
        return quantized
    choices, known = config["choices"], config["calibration_set"]
    if known.get("scheduler") not in (None, type(model.scheduler).__name__):
        model = with_scheduler(model, known["scheduler"])
    asked = {**choices["calibration"], "seed": choices["seed"]}
    other = next((key for key, value in make_recipe(model, **asked).items() if known.get(key) != value), None)
    if other:
        why = f"it differs in {other}" if known.get("sampler") else "its calls were recorded"
        raise UsageError(
            f"--correction {name} needs the artifact's calibration set, which cannot be sampled again here ({why}); "
            "leave the correction out."
        )
    return corrected(name, model, quantized, collect_cached(model, **asked))


def _real(network: Any, paths: list[Path], baseline: Baseline) -> tuple[Tensor, Tensor, Tensor] | None:
    """What Inception says of the real images."""
    if network is None:
        return None
    if baseline.images is None:
        raise UsageError("The samples are sounds, or latents without a VAE, and no images; leave out --data.")
    height, width = baseline.images.shape[2:]
    return inception.describe(network, inception.read_real(paths, (height, width)))


def _inception(network: Any, images: Tensor | None, real: tuple[Tensor, Tensor, Tensor] | None) -> dict[str, float]:
    return {} if images is None or real is None else inception.against_data(network, images, real)


def _notes(baseline: Baseline, network: Any) -> list[str]:
    notes = [FIXED, DATA if baseline.described else NO_IMAGES if baseline.images is None else NO_CLASSIFIER]
    return [*notes, INCEPTION] if network is not None else notes


def _rows(document: dict[str, Any]) -> list[tuple[Metric, str, str, str]]:
    """Metric, full precision, quantized, difference."""
    full, mine = document["full_precision"], document["quantized"]
    rows = []
    for metric in METRICS:
        if metric.key in mine:
            value, before = mine[metric.key], full.get(metric.key)
            change = "" if before is None else f"{value - before:+.{metric.digits}f}"
            rows.append((metric, "" if before is None else metric.text(before), metric.text(value), change))
    return rows


def _title(metric: Metric) -> str:
    return f"{metric.title} {'↑' if metric.higher_is_better else '↓'}"


def _headline(document: dict[str, Any]) -> str:
    how = [document["backend"]] if document["correction"] == "none" else [document["backend"], document["correction"]]
    return (
        f"{document['scheme']} {document['method']} ({', '.join(how)}): {document['samples']} samples, "
        f"{document['num_inference_steps']} steps of {document['scheduler']}, seed {document['seed']}"
    )


def _show(document: dict[str, Any]) -> None:
    table = Table(title=_headline(document), caption="↑ higher is better, ↓ lower is better", title_justify="left")
    for column in ("", "full precision", "quantized", "difference"):
        table.add_column(column, justify="right" if column else "left")
    rows = _rows(document)
    for i, (metric, *cells) in enumerate(rows):
        table.add_row(
            _title(metric), *cells, end_section=i + 1 < len(rows) and rows[i + 1][0].against != metric.against
        )
    console = result_console()
    console.print(table)
    for note in document["compared_with"]:
        console.print(note)


def _write(
    output_dir: Path, document: dict[str, Any], baseline: Baseline, measured: Evaluation, overwrite: bool
) -> None:
    lines = [f"# {_headline(document)}", "", "| | full precision | quantized | difference |", "|---|---:|---:|---:|"]
    lines += [f"| {_title(metric)} | {' | '.join(cells)} |" for metric, *cells in _rows(document)]
    lines += ["", *(f"- {note}" for note in document["compared_with"]), ""]
    text = json.dumps(document, indent=2, sort_keys=True, allow_nan=False) + "\n"
    with publish_directory(output_dir, _CONTENTS if overwrite else None) as folder:
        write_file(folder / _DOCUMENT, text.encode())
        write_file(folder / _TABLE, "\n".join(lines).encode())
        if baseline.images is not None and measured.images is not None:
            panels = {"full precision": baseline.images, document["scheme"]: measured.images}
            picture = grid_png(panels, baseline.reference.conditions, GRID_IMAGES)
            write_file(folder / _PICTURE, picture)
