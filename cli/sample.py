"""``ptq-tdq sample``: a picture of full-precision and quantized samples side by side."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import click
import diffusers

from ptq_tdq.artifacts import check_base_model, read_artifact, write_atomic
from ptq_tdq.calib_data import REFERENCE_ID, load_model
from ptq_tdq.cli.options import model_option, threads_option
from ptq_tdq.errors import ConfigError
from ptq_tdq.evaluate.images import decode, grid
from ptq_tdq.evaluate.metrics import psnr_db, sqnr_db
from ptq_tdq.evaluate.trajectories import make_noise, run
from ptq_tdq.load import load_quantized


@click.command("sample")
@click.argument("artifact", type=click.Path(path_type=Path))
@model_option
@click.option(
    "--output", type=click.Path(path_type=Path, dir_okay=False), default=Path("samples.png"), show_default=True
)
@click.option("--num-images", type=click.IntRange(min=1), default=40, show_default=True)
@click.option("--num-inference-steps", type=click.IntRange(min=1), default=25, show_default=True)
@click.option("--scheduler", metavar="CLASS", help="Any diffusers scheduler, e.g. EulerDiscreteScheduler.")
@click.option("--seed", type=int, default=0, show_default=True)
@threads_option
def sample_command(
    artifact: Path,
    source: str | None,
    output: Path,
    num_images: int,
    num_inference_steps: int,
    scheduler: str | None,
    seed: int,
) -> None:
    """Sample with ARTIFACT and with its full-precision model, from the same noise, into a PNG."""
    stored = read_artifact(artifact)
    base = stored.config["base_model"]["id"]
    model = load_model(source or (None if base == REFERENCE_ID else base))
    check_base_model(stored, model.sha256)
    if scheduler:
        cls = getattr(diffusers, scheduler, None)
        if not scheduler.endswith("Scheduler") or cls is None:
            raise ConfigError(
                f"diffusers has no scheduler named {scheduler!r}; try DDIMScheduler or EulerDiscreteScheduler."
            )
        model = replace(model, scheduler=cls.from_config(model.scheduler.config))
    noise, labels = make_noise(model, num_images, seed)
    quantized = load_quantized(artifact)
    latents = [run(unet, model, noise, labels, num_inference_steps, seed) for unet in (model.unet, quantized)]
    images = [decode(model, x) for x in latents]
    full, mine = images
    columns = model.num_classes if 0 < model.num_classes <= num_images else max(1, round(num_images**0.5))
    panels = dict(zip(("full precision", f"{stored.config['scheme']} {stored.config['method']}"), images, strict=True))
    buffer = io.BytesIO()
    grid(panels, columns).save(buffer, format="PNG")
    write_atomic(output, buffer.getvalue())
    click.echo(
        f"Wrote {output}: {num_images} images, {num_inference_steps} steps of {type(model.scheduler).__name__}; "
        f"latents {sqnr_db(*latents):.1f} dB SQNR, images {psnr_db(full, mine, peak=2.0):.1f} dB PSNR"
    )
