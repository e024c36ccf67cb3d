"""``ptq-tdq sample``: a picture of full-precision and quantized samples side by side."""

from __future__ import annotations

from pathlib import Path

import click
from diffusers.utils import logging as diffusers_logging

from ptq_tdq.artifacts import check_base_model, read_artifact, write_atomic
from ptq_tdq.calib_data import with_scheduler
from ptq_tdq.cli.options import (
    backend_option,
    json_option,
    original_option,
    print_json,
    quiet_option,
    scheduler_option,
    steps_option,
    threads_option,
    verbose_option,
)
from ptq_tdq.cli.original import load_original
from ptq_tdq.errors import ModelError
from ptq_tdq.evaluate.images import decode, grid_png
from ptq_tdq.evaluate.metrics import psnr_db, sqnr_db
from ptq_tdq.evaluate.trajectories import make_noise, run
from ptq_tdq.load import Backend, load_quantized


@click.command("sample")
@click.argument("artifact", type=click.Path(path_type=Path))
@original_option
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("samples.png"),
    show_default=True,
    help="The PNG to write.",
)
@click.option("--num-images", type=click.IntRange(min=1), default=40, show_default=True, help="Images of each model.")
@steps_option
@scheduler_option
@backend_option
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the noise.")
@threads_option
@json_option
@verbose_option
@quiet_option
def sample_command(
    artifact: Path,
    source: str | None,
    output: Path,
    num_images: int,
    num_inference_steps: int,
    scheduler: str | None,
    backend: Backend,
    seed: int,
    as_json: bool,
    verbose: bool,
    quiet: bool,
) -> None:
    """Sample with ARTIFACT and with its full-precision model, from the same noise, into a PNG."""
    diffusers_logging.set_verbosity_error()  # schedulers report what they adjust; the user asked for a picture
    stored = read_artifact(artifact)
    model = load_original(source, stored.config["base_model"]["id"])
    check_base_model(stored, model.sha256)
    if scheduler:
        model = with_scheduler(model, scheduler)
    if model.vae is None and model.unet.config.out_channels not in (1, 3):
        raise ModelError(
            f"The samples have {model.unet.config.out_channels} channels and the model has no VAE to turn them into "
            "images; pass --model with the pipeline folder that has one."
        )
    noise, labels = make_noise(model, num_images, seed)
    quantized = load_quantized(artifact, backend=backend)
    latents = [run(unet, model, noise, labels, num_inference_steps, seed) for unet in (model.unet, quantized)]
    full, mine = (decode(model, x) for x in latents)
    panels = {"full precision": full, f"{stored.config['scheme']} {stored.config['method']}": mine}
    write_atomic(output, grid_png(panels, model.num_classes))
    facts = {
        "output": str(output),
        "num_images": num_images,
        "num_inference_steps": num_inference_steps,
        "scheduler": type(model.scheduler).__name__,
        "latent_sqnr_db": sqnr_db(*latents),
        "image_psnr_db": psnr_db(full, mine, peak=2.0),
    }
    if as_json:
        print_json(facts)
    elif not quiet:
        click.echo(
            f"Wrote {output}: {num_images} images, {num_inference_steps} steps of {facts['scheduler']}; "
            f"latents {facts['latent_sqnr_db']:.1f} dB SQNR, images {facts['image_psnr_db']:.1f} dB PSNR"
        )
