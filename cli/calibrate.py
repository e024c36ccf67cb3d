"""``ptq-tdq calibrate``: the main job."""

from __future__ import annotations

import time
from math import ceil
from pathlib import Path
from typing import Any

import click

from ptq_tdq.artifacts import alone, check_output
from ptq_tdq.calib_data import collect_cached, load_model, with_scheduler
from ptq_tdq.calibration import calibrate, foresee
from ptq_tdq.cli.options import (
    FilePath,
    Size,
    json_option,
    model_options,
    print_json,
    quiet_option,
    scheduler_option,
    threads_option,
    verbose_option,
)
from ptq_tdq.cli.progress import Progress, show_files, show_forecast, show_gain
from ptq_tdq.cli.unfinished import clear, discard, unfinished_folder
from ptq_tdq.config import COLLECT_CHOICES, PRESETS, Config, preset, read_config_file
from ptq_tdq.errors import ConfigError
from ptq_tdq.evaluate.trajectories import compare, make_reference
from ptq_tdq.recon import CACHE_BYTES, check_room

FLAGS = {  # choice of the preset -> metavar, help
    "scheme": ("W<bits>A<bits>", "Bits of weights and activations, 2 to 8 each."),
    "method": (
        "NAME",
        "Intervals of activations: auto (static or tdq-thin, whichever pays), static (S_1: one learned number for all "
        "t), S_N (one for each Nth of the time axis: S_4), tdq and tdq-thin (networks of t), step-table and step-lsq "
        "(one for each sampling step, searched or learned); at run time dynamic, dynamic-statistics, "
        "dynamic-statistics-time, dynamic-token, dynamic-token-static, dynamic-token-table, dynamic-token-tdq.",
    ),
    "samples_per_step": ("N", "Calibration samples at each step; in all N times --calibration-steps."),
    "calibration_steps": ("N", "How many of the sampler's steps calibration looks at; all, if it has fewer."),
    "num_inference_steps": ("N", "Steps of the sampler."),
    "step_distribution": ("NAME", "How these steps are chosen: uniform, or normal (PTQ4DM)."),
    "seed": ("N", "Seed of noise, order and initialisation."),
}


def _choice_flags(command: Any) -> Any:
    """One flag for each choice that users name most; ``--set`` reaches all of them."""
    defaults = Config().to_dict()
    for name, (metavar, text) in reversed(FLAGS.items()):
        flag = f"--{name.replace('_', '-')}"
        command = click.option(flag, name, metavar=metavar, help=f"{text}  [preset default: {defaults[name]}]")(command)
    return command


@click.command("calibrate")
@model_options
@click.option("--output-dir", type=FilePath(), required=True, help="The artifact directory to write.")
@click.option(
    "--preset",
    "preset_name",
    type=click.Choice(list(PRESETS)),
    show_default="default",
    help="Where every choice comes from that no flag and no file names.",
)
@_choice_flags
@scheduler_option
@click.option("--skip", multiple=True, metavar="PATTERN", help="Leave layers whose name matches in floating point.")
@click.option("--config", "config_file", type=FilePath(), help="TOML or JSON file of choices.")
@click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any choice by name; --show-config lists them."
)
@click.option("--show-config", is_flag=True, help="Print every choice as JSON, fit for --config, and stop.")
@click.option(
    "--cache-budget",
    type=Size(),
    default=CACHE_BYTES,
    show_default="2GiB",
    help="What flows between blocks is kept in memory up to so much; more lies in files in OUTPUT_DIR.partial.",
)
@click.option("--dry-run", is_flag=True, help="Print what the run will take (memory, disk, time) and stop.")
@click.option("--resume/--no-resume", default=True, show_default=True, help="Go on with an unfinished run.")
@click.option("--overwrite", is_flag=True, help="Replace an artifact that is already there.")
@click.option(
    "--evaluation-samples",
    type=click.IntRange(min=0, max=1 << 20),
    show_default="64; 4 with a pipeline",
    help="Samples on which the result is measured; 0 measures nothing.",
)
@threads_option
@json_option
@verbose_option
@quiet_option
@click.pass_context
def calibrate_command(
    context: click.Context,
    /,
    source: str | None,
    output_dir: Path,
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
    intervals as a function of the time step, block by block, and writes an artifact directory. Flags go before the file
    of --config, --set before both. An interrupted run is kept in OUTPUT_DIR.partial; the same command goes on at the
    first unfinished block.
    """
    began = time.perf_counter()
    flags = {key: given.pop(key) for key in FLAGS}
    config = _resolve(preset_name, config_file, flags, skip, settings)
    if show_config:
        print_json(config.to_dict())
        return
    check_output(output_dir, overwrite=overwrite)
    unfinished = unfinished_folder(output_dir)
    context.ensure_object(dict)["on_stop"] = "Stopped; the same command goes on after the last finished block."
    say = Progress(quiet=quiet, verbose=verbose)
    model = load_model(source, **given)
    if scheduler is not None:
        model = with_scheduler(model, scheduler)
    model_id = _id(model.id)
    for notice in model.notices:
        say.notice(notice)
    say.config(config)
    found = foresee(model, config, cache_budget=cache_budget)
    if dry_run:
        print_json(found.to_dict()) if as_json else show_forecast(found)
    check_room(found, unfinished)
    if dry_run:
        return
    context.with_resource(alone(unfinished))
    calls = collect_cached(model, on_progress=say.collecting, **{key: getattr(config, key) for key in COLLECT_CHOICES})
    if not resume:
        clear(unfinished)
    with say.units():
        quantized = calibrate(
            model,
            config,
            calls,
            model_id=model_id,
            run_directory=unfinished,
            cache_budget=cache_budget,
            on_unit=say.unit,
            on_notice=say.notice,
        )
    for notice in quantized.notices:
        say.notice(notice)
    learned = static = None
    if evaluation_samples is None:
        evaluation_samples = min(64, model.sampler.batch)
    if evaluation_samples:
        steps, batch = config.num_inference_steps, model.sampler.batch
        own, given = steps * ceil(evaluation_samples / batch), ceil(steps * evaluation_samples / batch)
        with say.calls("Measuring on other noise", 3 * (own + given), model.denoiser, quantized):
            reference = make_reference(model, samples=evaluation_samples, num_inference_steps=steps, seed=config.seed)
            learned = compare(reference, quantized)
            with quantized.intervals(quantized.static):
                static = compare(reference, quantized)
        quantized.metrics |= {
            "samples": evaluation_samples,
            "num_inference_steps": config.num_inference_steps,
            "learned": learned.to_dict(),
            "static": static.to_dict(),
        }
    quantized.save_pretrained(output_dir, overwrite=overwrite)
    discard(unfinished)
    if as_json:
        print_json({"output_dir": str(output_dir), **quantized.metrics})
    elif not quiet:
        if learned and static:
            show_gain(config.method, learned, static)
        show_files(output_dir, time.perf_counter() - began)


def _id(source: str) -> str:
    """A folder that could be taken for a hub id is written as the folder that it is.

    Raises :class:`ConfigError` for a name that an artifact cannot hold.
    """
    try:
        source.encode()
    except UnicodeEncodeError:
        raise ConfigError("The name of the model's folder is not UTF-8; rename it.") from None
    looks_like_a_hub_id = not source.startswith((".", "~", "/")) and Path(source).is_dir()
    return f"./{source}" if looks_like_a_hub_id else source


def _resolve(
    name: str | None,
    file: Path | None,
    flags: dict[str, str | None],
    skip: tuple[str, ...],
    settings: tuple[str, ...],
) -> Config:
    """Preset, then config file, then flags, then ``--set``."""
    choices: dict[str, Any] = dict(read_config_file(file)) if file else {}
    chosen = choices.pop("preset", "default")
    choices |= {key: value for key, value in flags.items() if value is not None}
    if skip:
        choices["skip"] = skip
    for text in settings:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--set takes KEY=VALUE. Got {text!r} instead.")
        choices[key.strip().replace("-", "_")] = value.strip()
    if "preset" in choices:
        raise ConfigError(f"The preset is named by --preset. Got --set preset={choices['preset']} instead.")
    return preset(name or chosen, **choices)
