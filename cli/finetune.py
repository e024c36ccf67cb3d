"""``ptq-tdq finetune``: weights and intervals of a calibrated model learn together."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from ptq_tdq import processes
from ptq_tdq.artifacts import Artifact, read_artifact
from ptq_tdq.atomic import check_space
from ptq_tdq.calib_data import LoadedModel, collect_cached
from ptq_tdq.cli.options import (
    FilePath,
    choice_options,
    evaluation_count,
    json_option,
    original_options,
    print_json,
    quiet_option,
    read_choices,
    read_settings,
    refuse_inside,
    result_console,
    run_options,
    threads_option,
    verbose_option,
)
from ptq_tdq.cli.original import load_original
from ptq_tdq.cli.progress import Progress
from ptq_tdq.cli.unfinished import Unfinished
from ptq_tdq.evaluate.trajectories import Comparison, compare, make_reference
from ptq_tdq.finetuning import FinetuneConfig, IterationReport, check_start, disk_bytes, finetune, recipe
from ptq_tdq.load import build_quantized
from ptq_tdq.quantized_model import QuantizedModel

FLAGS = {
    "iterations": "N",
    "method": "NAME",
    "quantizer": "NAME",
    "loss": "NAME",
    "trajectories": "N",
    "batch_size": "N",
    "seed": "N",
}
SPOKEN = 100  # lines of -v in a run


@click.command("finetune")
@click.argument("artifact", type=FilePath())
@original_options
@click.option("--output-dir", type=FilePath(), required=True, help="The artifact directory to write.")
@click.option(
    "--data",
    type=FilePath(),
    help="A folder of images, or an npz file of images or latents.  [default: none, full precision is imitated]",
)
@choice_options(FinetuneConfig, FLAGS)
@run_options
@threads_option
@json_option
@verbose_option
@quiet_option
@click.pass_context
def finetune_command(
    context: click.Context,
    /,
    artifact: Path,
    source: str | None,
    output_dir: Path,
    data: Path | None,
    config_file: Path | None,
    settings: tuple[str, ...],
    show_config: bool,
    resume: bool,
    overwrite: bool,
    evaluation_samples: int | None,
    as_json: bool,
    verbose: bool,
    quiet: bool,
    **given: Any,
) -> None:
    """Train the weights and intervals of ARTIFACT together.

    Without --data the model learns to predict what its full-precision original does, on trajectories of that. Writes
    an artifact directory that every other command takes. An interrupted run is kept in OUTPUT_DIR.partial; the same
    command goes on at its last checkpoint. Started by torchrun or accelerate launch, processes share each batch.
    """
    chosen = {key: given.pop(key) for key in FLAGS} | read_settings(settings)
    config = FinetuneConfig().changed(read_choices(FinetuneConfig, config_file, chosen))
    if show_config:
        print_json(config.to_dict())
        return
    with processes.joined(given["device"]) as given["device"]:
        first = processes.rank() == 0
        with processes.together():
            refuse_inside(output_dir.parent, [artifact])  # its own place is for --overwrite
            run = Unfinished(context, output_dir, overwrite=overwrite, stopped="at the last checkpoint")
            stored = read_artifact(artifact)
            say = _Training(quiet=quiet or not first, verbose=verbose)
            model = load_original(source, stored, **given)
            check_start(model, stored, config, data)
            if first:
                check_space(disk_bytes(model), run.folder)
        run.hold(resume=resume)
        with processes.first_alone():
            sampled = partial(say.counting, "Sampling in full precision")
            calls = collect_cached(model, on_progress=sampled, **recipe(config)) if data is None else None
        tuned = finetune(
            model,
            stored,
            config,
            data or calls,
            run_directory=run.folder,
            on_iteration=say.iteration,
            on_notice=say.notice,
        )
    say.stop()
    if not first:
        return
    samples = evaluation_count(evaluation_samples, model)
    found: dict[str, Comparison] = {}
    if samples:
        say.line("Measuring against full precision, from noise that nothing has seen")
        found = _measure(model, stored, tuned, config, samples)
    held_out = tuned.metrics["finetune"]["held_out"]
    run.finish(tuned, as_json=as_json, quiet=quiet, show=partial(_show, held_out, found))


def _measure(
    model: LoadedModel, stored: Artifact, tuned: QuantizedModel, config: FinetuneConfig, samples: int
) -> dict[str, Comparison]:
    """Both models against full precision; the metrics of ``tuned`` hold it too."""
    steps = config.num_inference_steps
    reference = make_reference(model, samples=samples, num_inference_steps=steps, seed=config.seed)
    calibrated = build_quantized(stored, model.denoiser).to(tuned.device)
    found = {"calibrated": compare(reference, calibrated), "fine-tuned": compare(reference, tuned)}
    tuned.metrics |= {"samples": samples, "num_inference_steps": steps}
    tuned.metrics["finetune"] |= {name: comparison.to_dict() for name, comparison in found.items()}
    return found


class _Training(Progress):
    """Progress of the iterations: a bar with loss and speed, with -v a line now and then."""

    def iteration(self, report: IterationReport) -> None:
        note = f"loss {report.loss:.4g}, {1 / max(report.seconds, 1e-9):.2g} iterations/s"
        self._advance("Fine-tuning", report.iteration, report.total, note)
        if self.verbose and report.iteration % max(1, report.total // SPOKEN) == 0:
            left = report.seconds * (report.total - report.iteration) / 60
            self.line(f"iteration {report.iteration}/{report.total} {note}, {left:.1f} minutes left")


def _show(held_out: dict[str, float], found: dict[str, Comparison]) -> None:
    """The model before and after, on stdout."""
    table = Table(title="Calibrated and fine-tuned")
    for column in ("", "calibrated", "fine-tuned"):
        table.add_column(column, justify="right" if column else "left")
    table.add_row("loss on held-out samples", *(f"{value:.4g}" for value in held_out.values()))
    if found:
        table.add_row("prediction, mean over t (SQNR, dB)", *(f"{x.mean_noise_sqnr_db:.2f}" for x in found.values()))
        table.add_row("final latents (SQNR, dB)", *(f"{x.latent_sqnr_db:.2f}" for x in found.values()))
    result_console().print(table)
