"""``ptq-tdq calibrate``: the main job."""

from __future__ import annotations

from functools import partial
from math import ceil
from pathlib import Path
from typing import Any

import click

from ptq_tdq import processes
from ptq_tdq.calib_data import LoadedModel, collect_cached, load_model, with_scheduler
from ptq_tdq.calibration import calibrate, foresee, written_id
from ptq_tdq.cli.options import (
    FilePath,
    Size,
    choice_options,
    evaluation_count,
    json_option,
    model_options,
    print_json,
    quiet_option,
    read_choices,
    read_settings,
    run_options,
    scheduler_option,
    threads_option,
    verbose_option,
)
from ptq_tdq.cli.progress import Progress, show_forecast, show_gain
from ptq_tdq.cli.unfinished import Unfinished
from ptq_tdq.config import PRESETS, Config, preset
from ptq_tdq.errors import ConfigError
from ptq_tdq.evaluate.trajectories import Comparison, compare, make_reference
from ptq_tdq.quantized_model import QuantizedModel
from ptq_tdq.recon import CACHE_BYTES, check_room

FLAGS = {
    "scheme": "W<bits>A<bits>",
    "method": "NAME",
    "samples_per_step": "N",
    "calibration_steps": "N",
    "num_inference_steps": "N",
    "step_distribution": "NAME",
    "seed": "N",
}


@click.command("calibrate")
@model_options
@click.option("--output-dir", type=FilePath(), help="The artifact directory to write.  [required]")
@click.option(
    "--preset",
    "preset_name",
    type=click.Choice(list(PRESETS)),
    show_default="default",
    help="Where every choice comes from that no flag and no file names.",
)
@choice_options(Config, FLAGS, "preset default")
@scheduler_option
@click.option("--skip", multiple=True, metavar="PATTERN", help="Leave layers whose name matches in floating point.")
@click.option(
    "--cache-budget",
    type=Size(),
    default=CACHE_BYTES,
    show_default="2GiB",
    help="What flows between blocks is kept in memory up to so much; more lies in files in OUTPUT_DIR.partial. As much "
    "again may wait inside a block while its weights are rounded; more is computed again.",
)
@click.option("--dry-run", is_flag=True, help="Print what the run will take (memory, disk, time) and stop.")
@run_options
@threads_option
@json_option
@verbose_option
@quiet_option
@click.pass_context
def calibrate_command(
    context: click.Context,
    /,
    source: str | None,
    output_dir: Path | None,
    preset_name: str | None,
    scheduler: str | None,
    skip: tuple[str, ...],
    config_file: Path | None,
    settings: tuple[str, ...],
    show_config: bool,
    cache_budget: int,
    dry_run: bool,
    resume: bool,
    overwrite: bool,
    evaluation_samples: int | None,
    as_json: bool,
    verbose: bool,
    quiet: bool,
    **given: Any,
) -> None:
    """Quantize the denoiser of a diffusion model and write its interval tables.

    Samples with the model's own pipeline for a calibration set, learns the rounding of the weights and the activation
    intervals as a function of the time step, block by block, and writes an artifact directory. Flags override the file
    of --config; --set overrides both. An interrupted run is kept in OUTPUT_DIR.partial; the same command goes on at the
    first unfinished block. Started by torchrun or accelerate launch, processes share the calls and the work.
    """
    flags = {key: given.pop(key) for key in FLAGS}
    config = _resolve(preset_name, config_file, flags, skip, settings)
    if show_config:
        print_json(config.to_dict())
        return
    if output_dir is None:
        raise click.MissingParameter(ctx=context, param_hint="'--output-dir'", param_type="option")
    with processes.joined(given["device"]) as given["device"]:
        first = processes.rank() == 0
        with processes.together():
            run = Unfinished(context, output_dir, overwrite=overwrite, stopped="after the last finished block")
            say = Progress(quiet=quiet or not first, verbose=verbose)
            model = _load(source, scheduler, say, **given)
        say.config(config)
        samples = evaluation_count(evaluation_samples, model)
        if first:
            found = foresee(model, config, cache_budget=cache_budget, evaluation_samples=samples)
            if dry_run and as_json:
                print_json(found.to_dict())
            elif dry_run and not quiet:
                show_forecast(found)
            check_room(found, run.folder)
        if dry_run:
            return
        run.hold(resume=resume)
        with processes.first_alone():
            sampled = partial(say.counting, "Sampling in full precision")
            calls = collect_cached(model, on_progress=sampled, **config.recipe)
        quantized = calibrate(
            model,
            config,
            calls,
            run_directory=run.folder,
            cache_budget=cache_budget,
            on_unit=say.unit,
            on_notice=say.notice,
        )
    say.stop()
    if not first:
        return
    for notice in quantized.notices:
        say.notice(notice)
    measured = _measure(quantized, model, samples, config, say) if samples else None
    show = partial(show_gain, config.method, *measured) if measured else None
    run.finish(quantized, as_json=as_json, quiet=quiet, show=show)


def _load(source: str | None, scheduler: str | None, say: Progress, **given: Any) -> LoadedModel:
    say.line("Loading the model and looking at its layers")
    model = load_model(source, **given)
    if scheduler is not None:
        model = with_scheduler(model, scheduler)
    written_id(model.id)
    for notice in model.notices:
        say.notice(notice)
    return model


def _measure(
    quantized: QuantizedModel, model: LoadedModel, samples: int, config: Config, say: Progress
) -> tuple[Comparison, Comparison]:
    """The model with its own intervals and with static ones, on other noise; its metrics say both."""
    steps, batch = config.calibration.num_inference_steps, model.sampler.batch
    own, along = steps * ceil(samples / batch), ceil(steps * samples / batch)
    with say.calls("Measuring on other noise", 3 * (own + along), model.denoiser, quantized):
        reference = make_reference(model, samples=samples, num_inference_steps=steps, seed=config.seed)
        learned = compare(reference, quantized)
        with quantized.intervals(quantized.static):
            static = compare(reference, quantized)
    quantized.metrics |= {
        "samples": samples,
        "num_inference_steps": steps,
        "learned": learned.to_dict(),
        "static": static.to_dict(),
    }
    return learned, static


def _resolve(
    name: str | None,
    file: Path | None,
    flags: dict[str, str | None],
    skip: tuple[str, ...],
    settings: tuple[str, ...],
) -> Config:
    """Preset, then config file, then flags, then ``--set``."""
    given = read_settings(settings)
    if "preset" in given:
        raise ConfigError(f"The preset is named by --preset. Got --set preset={given['preset']} instead.")
    choices = read_choices(Config, file, {**flags, "skip": skip or None, "preset": name, **given})
    return preset(choices.pop("preset", "default"), **choices)
