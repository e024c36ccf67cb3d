"""``ptq-tdq sample``: a picture of full-precision and quantized samples side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ptq_tdq.artifacts import check_base_model, read_artifact, write_atomic
from ptq_tdq.calib_data import with_scheduler
from ptq_tdq.cli.options import (
    FilePath,
    backend_option,
    json_option,
    original_options,
    print_json,
    quiet_option,
    scheduler_option,
    steps_option,
    threads_option,
    verbose_option,
)
from ptq_tdq.cli.original import load_original, quiet_schedulers
from ptq_tdq.evaluate.images import captions_of, count_classes, grid_png
from ptq_tdq.evaluate.metrics import psnr_db, sqnr_db
from ptq_tdq.evaluate.trajectories import finite, run
from ptq_tdq.load import Backend, load_quantized

IMAGES, PIPELINE_IMAGES = 40, 8  # of a plain loop over a small denoiser, and of a pipeline


@click.command("sample")
@click.argument("artifact", type=FilePath())
@original_options
@click.option(
    "--output",
    type=FilePath(dir_okay=False),
    default=Path("samples.png"),
    show_default=True,
    help="The PNG to write.",
)
@click.option(
    "--num-images",
    type=click.IntRange(1, 1 << 20),
    help=f"Samples of each model.  [default: {IMAGES}; {PIPELINE_IMAGES} with a pipeline]",
)
@steps_option
@scheduler_option
@backend_option
@click.option("--seed", type=click.IntRange(0, (1 << 32) - 1), default=0, show_default=True, help="Seed of the noise.")
@threads_option
@json_option
@verbose_option
@quiet_option
def sample_command(
    artifact: Path,
    source: str | None,
    output: Path,
    num_images: int | None,
    num_inference_steps: int,
    scheduler: str | None,
    backend: Backend,
    seed: int,
    as_json: bool,
    verbose: bool,
    quiet: bool,
    **given: Any,
) -> None:
    """Sample with ARTIFACT and with its full-precision model, from the same noise, into a PNG.

    Prompts, classes and the pipeline's arguments are those of calibration unless they are named here. Sounds, and
    latents that no VAE turns into images, are compared without a picture.
    """
    quiet_schedulers()
    stored = read_artifact(artifact)
    model = load_original(source, stored, **given)
    check_base_model(stored, model.sha256)
    if scheduler:
        model = with_scheduler(model, scheduler)
    count = num_images or (PIPELINE_IMAGES if model.sampler.batch < IMAGES else IMAGES)
    conditions = model.sampler.conditions(count)
    quantized = load_quantized(artifact, backend=backend, device=given["device"])
    full, mine = (run(each, model, conditions, num_inference_steps, seed) for each in (model.denoiser, quantized))
    facts: dict[str, Any] = {
        "output": None,
        "num_images": count,
        "num_inference_steps": num_inference_steps,
        "scheduler": type(model.scheduler).__name__,
        "latent_sqnr_db": finite(sqnr_db(full.latents, mine.latents)),
    }
    if full.images is not None and mine.images is not None:
        panels = {"full precision": full.images, f"{stored.config['scheme']} {stored.config['method']}": mine.images}
        write_atomic(output, grid_png(panels, count_classes(conditions), captions=captions_of(conditions)))
        facts |= {"output": str(output), "image_psnr_db": finite(psnr_db(full.images, mine.images, peak=2.0))}
    if as_json:
        print_json(facts)
    elif not quiet:
        click.echo(_summary(facts))


def _summary(facts: dict[str, Any]) -> str:
    """One sentence for the user."""
    how = f"{facts['num_images']} samples, {facts['num_inference_steps']} steps of {facts['scheduler']}"
    latents = f"latents {_decibels(facts['latent_sqnr_db'])} SQNR"
    if facts["output"] is None:
        return (
            "No picture: the samples are sounds, or latents that the model has no VAE to turn into images. "
            f"{how}; {latents}"
        )
    return f"Wrote {facts['output']}: {how}; {latents}, images {_decibels(facts['image_psnr_db'])} PSNR"


def _decibels(value: float | None) -> str:
    return "∞ dB" if value is None else f"{value:.1f} dB"
