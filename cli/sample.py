"""``ptq-tdq sample``: a picture of full-precision and quantized samples side by side."""

from __future__ import annotations

from math import ceil
from pathlib import Path
from typing import Any

import click
from torch import Tensor

from ptq_tdq.artifacts import Artifact, check_base_model, read_artifact
from ptq_tdq.atomic import FileKind, check_file_target, write_atomic
from ptq_tdq.calib_data import with_scheduler
from ptq_tdq.calib_data.sampler import Sampled
from ptq_tdq.cli.options import (
    FilePath,
    backend_option,
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
from ptq_tdq.cli.original import load_original, quiet_schedulers
from ptq_tdq.cli.progress import Progress
from ptq_tdq.errors import UsageError
from ptq_tdq.evaluate.images import grid_png
from ptq_tdq.evaluate.metrics import psnr_db, sqnr_db
from ptq_tdq.evaluate.trajectories import finite, run
from ptq_tdq.load import Backend, load_quantized

PICTURE = FileKind("a PNG image", rb"\x89PNG\r\n")
IMAGES, PIPELINE_IMAGES = 40, 8  # of a plain loop over a small denoiser, and of a pipeline


def _png(context: click.Context, parameter: click.Parameter, path: Path) -> Path:
    if path.suffix.lower() != ".png":
        raise UsageError(f"The samples are written as PNG; give a name that ends in .png. Got '{path}' instead.")
    return path


@click.command("sample")
@click.argument("artifacts", type=FilePath(), nargs=-1, required=True, metavar="ARTIFACT...")
@original_options
@click.option(
    "--output",
    type=FilePath(dir_okay=False),
    default=Path("samples.png"),
    show_default=True,
    callback=_png,
    help="The PNG to write, or to replace.",
)
@click.option(
    "--num-images",
    type=click.IntRange(1, 1 << 20),
    help=f"Samples of each model.  [default: {IMAGES}; {PIPELINE_IMAGES} with a pipeline]",
)
@steps_option
@scheduler_option
@backend_option
@seed_option
@threads_option
@json_option
@verbose_option
@quiet_option
def sample_command(
    artifacts: tuple[Path, ...],
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
    """Sample with each ARTIFACT and with the full-precision model, from the same noise, into a PNG.

    All are of one model. Prompts, classes and the pipeline's arguments are those of the first one's calibration unless
    they are named here. Sounds, and latents that no VAE turns into images, are compared without a picture.
    """
    refuse_inside(output, artifacts)
    check_file_target(output, PICTURE)
    quiet_schedulers()
    stored = [read_artifact(artifact) for artifact in artifacts]
    model = load_original(source, stored[0], **given)
    for each in stored:
        check_base_model(each, model.sha256)
    if scheduler:
        model = with_scheduler(model, scheduler)
    count = num_images or (PIPELINE_IMAGES if model.sampler.batch < IMAGES else IMAGES)
    conditions = model.sampler.conditions(count)

    say, calls = Progress(quiet=quiet, verbose=verbose), num_inference_steps * ceil(count / model.sampler.batch)

    def sampled(denoiser: Any, title: str) -> Sampled:
        with say.calls(f"Sampling, {title}", calls, denoiser):
            return run(denoiser, model, conditions, num_inference_steps, seed)

    full, found, panels = sampled(model.denoiser, "full precision"), list[dict[str, Any]](), dict[str, Tensor]()
    for title, artifact in zip(numbered(list(map(_title, stored))), artifacts, strict=True):
        mine = sampled(load_quantized(artifact, backend=backend, device=given["device"]), title)
        found.append({"title": title, "latent_sqnr_db": finite(sqnr_db(full.latents, mine.latents))})
        if full.images is not None and mine.images is not None:
            found[-1]["image_psnr_db"] = finite(psnr_db(full.images, mine.images, peak=2.0))
            panels[title] = mine.images
    if panels and full.images is not None:
        shown = {"full precision": full.images, **panels}
        write_atomic(output, grid_png(shown, conditions))
    facts: dict[str, Any] = {
        "output": str(output) if panels else None,
        "num_images": count,
        "num_inference_steps": num_inference_steps,
        "scheduler": type(model.scheduler).__name__,
        "artifacts": found,
    }
    if as_json:
        print_json(facts)
    elif not quiet:
        click.echo(_summary(facts))


def _title(artifact: Artifact) -> str:
    """Bits, method and, if fine-tuned, the quantizer."""
    config = artifact.config
    quantizer = config.get("finetune", {}).get("choices", {}).get("quantizer")
    return " ".join(filter(None, (config["scheme"], config["method"], quantizer)))


def _summary(facts: dict[str, Any]) -> str:
    """A sentence for the user, and a line for each artifact."""
    how = f"{facts['num_images']} samples, {facts['num_inference_steps']} steps of {facts['scheduler']}"
    lines = [f"Wrote {facts['output']}: {how}"]
    if facts["output"] is None:
        lines = ["No picture: the samples are sounds, or latents that the model has no VAE to turn into images. " + how]
    for each in facts["artifacts"]:
        images = f", images {_decibels(each['image_psnr_db'])} PSNR" if "image_psnr_db" in each else ""
        lines.append(f"  {each['title']}: latents {_decibels(each['latent_sqnr_db'])} SQNR{images}")
    return "\n".join(lines)


def _decibels(value: float | None) -> str:
    return "∞ dB" if value is None else f"{value:.1f} dB"
