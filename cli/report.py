"""``ptq-tdq report``: one HTML page and the figures of one or several artifacts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ptq_tdq.artifacts import check_base_model, public_name, read_artifact
from ptq_tdq.calib_data import LoadedModel, with_scheduler
from ptq_tdq.cli.options import (
    FilePath,
    json_option,
    numbered,
    original_options,
    print_json,
    quiet_option,
    refuse_inside,
    scheduler_option,
    seed_option,
    steps_option,
    threads_option,
    verbose_option,
)
from ptq_tdq.cli.original import check_class, load_original, quiet_schedulers
from ptq_tdq.cli.progress import Progress
from ptq_tdq.errors import ArtifactMismatchError, ModelError, printable
from ptq_tdq.extras import need
from ptq_tdq.files import size_text
from ptq_tdq.report.survey import Subject, check_same_model, survey


@click.command("report")
@click.argument("artifacts", type=FilePath(), nargs=-1, required=True, metavar="ARTIFACT...")
@original_options
@click.option(
    "--output-dir",
    type=FilePath(),
    default=Path("report"),
    show_default=True,
    help="The folder to write: report.html and figures/.",
)
@click.option(
    "--samples",
    type=click.IntRange(0, 1 << 20),
    default=20,
    show_default=True,
    help="Trajectories to measure on; 0 shows only what the artifacts hold.",
)
@steps_option
@scheduler_option
@seed_option
@click.option("--overwrite", is_flag=True, help="Replace a report that is already there.")
@threads_option
@json_option
@verbose_option
@quiet_option
def report_command(
    artifacts: tuple[Path, ...],
    source: str | None,
    output_dir: Path,
    samples: int,
    num_inference_steps: int,
    scheduler: str | None,
    seed: int,
    overwrite: bool,
    as_json: bool,
    verbose: bool,
    quiet: bool,
    **given: Any,
) -> None:
    """Draw each ARTIFACT: intervals, distributions, errors, samples.

    Runs the full-precision and the quantized model side by side on new trajectories and writes one self-contained HTML
    page, which opens without a network, and its figures as PNG and SVG. The first artifact leads; the others are
    compared with it: bit widths, methods, or seeds of the same model.
    """
    for package in ("matplotlib", "jinja2"):
        need(package, "report")
    from ptq_tdq.report.write import check_output, write_report

    refuse_inside(output_dir, artifacts)
    quiet_schedulers()
    say = Progress(quiet=quiet, verbose=verbose)
    names = numbered([printable(path.resolve().name) for path in artifacts])
    subjects = [Subject(name, path, read_artifact(path)) for name, path in zip(names, artifacts, strict=True)]
    check_same_model(subjects)
    check_output(output_dir, overwrite)
    model, notices = _model(source, subjects[0], scheduler, given) if samples else (None, _NOT_ASKED)
    for notice in notices if samples else ():
        say.notice(notice)
    found = survey(
        subjects,
        model,
        samples=samples,
        num_inference_steps=num_inference_steps,
        seed=seed,
        notices=notices,
        on_progress=say.counting,
    )
    say.line("Drawing")
    files = write_report(found, output_dir, overwrite=overwrite)
    page = output_dir / files[0]
    if as_json:
        print_json({"output_dir": str(output_dir), "page": str(page), "files": files, "measured": model is not None})
    elif not quiet:
        click.echo(f"Wrote {page} ({size_text(page.stat().st_size)}) and {len(files) - 1} figures")


_NOT_ASKED = ("Nothing was measured for this page (--samples 0); it shows what the artifacts hold.",)


def _model(
    source: str | None, subject: Subject, scheduler: str | None, given: dict[str, Any]
) -> tuple[LoadedModel | None, tuple[str, ...]]:
    """The model named by the user, else the artifact's own; None and a notice where that cannot be used from here."""
    name = public_name(subject.artifact.config["base_model"]["id"])
    if not source:
        try:
            check_class(subject.artifact)
        except (ModelError, ArtifactMismatchError) as error:
            return None, (f"Errors, distributions and samples are missing from the page. {error}",)
    try:
        model = load_original(source, subject.artifact, **given)
        check_base_model(subject.artifact, model.sha256)
    except (ModelError, ArtifactMismatchError) as error:
        if source:
            raise
        reason = "cannot be loaded from here" if isinstance(error, ModelError) else "is not the one that was quantized"
        return None, (
            f"The full-precision model '{name}' {reason}, so errors, distributions and samples are missing from the "
            "page; pass --model with its folder or hub id to have them.",
        )
    return (with_scheduler(model, scheduler) if scheduler else model), model.notices
