"""``ptq-tdq calibrate``: the main job."""

from __future__ import annotations

import shutil
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from ptq_tdq.artifacts import check_target
from ptq_tdq.calib_data import collect_cached, load_model
from ptq_tdq.calibrate import calibrate
from ptq_tdq.cli.options import json_option, model_option, print_json, threads_option, verbosity
from ptq_tdq.cli.progress import Progress
from ptq_tdq.config import PRESETS, Config, preset, read_config_file
from ptq_tdq.errors import ConfigError
from ptq_tdq.evaluate.trajectories import compare, make_reference

EVALUATION_SAMPLES = 64
COLLECT_KEYS = ("samples_per_step", "calibration_steps", "num_inference_steps", "step_distribution", "seed")
FLAGS = (
    "scheme",
    "method",
    "samples_per_step",
    "calibration_steps",
    "num_inference_steps",
    "step_distribution",
    "seed",
)


def _choice_flags(command: Any) -> Any:
    """One flag for each choice that users name most; ``--set`` reaches all of them."""
    for name in reversed(FLAGS):
        command = click.option(f"--{name.replace('_', '-')}", name, metavar="VALUE", help="Choice of the preset.")(
            command
        )
    return command


@click.command("calibrate")
@model_option
@click.option("--output-dir", type=click.Path(path_type=Path), required=True, help="The artifact directory to write.")
@click.option("--preset", "preset_name", type=click.Choice(list(PRESETS)), default="default", show_default=True)
@_choice_flags
@click.option("--skip", multiple=True, metavar="PATTERN", help="Leave layers whose name matches in floating point.")
@click.option("--config", "config_file", type=click.Path(path_type=Path), help="TOML or JSON file of choices.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any choice of the preset, by name.")
@click.option("--resume/--no-resume", default=True, show_default=True, help="Go on with an unfinished run.")
@click.option("--overwrite", is_flag=True, help="Replace an artifact that is already there.")
@threads_option
@json_option
@verbosity
def calibrate_command(
    source: str | None,
    output_dir: Path,
    preset_name: str,
    skip: tuple[str, ...],
    config_file: Path | None,
    settings: tuple[str, ...],
    resume: bool,
    overwrite: bool,
    as_json: bool,
    verbose: bool,
    quiet: bool,
    **flags: str | None,
) -> None:
    """Quantize a diffusion model and write its interval tables.

    Runs the model's own sampler for a calibration set, learns the rounding of the weights and the activation intervals
    as a function of the time step, block by block, and writes an artifact directory. An interrupted run goes on at the
    first unfinished block.
    """
    began = time.perf_counter()
    config = _resolve(preset_name, config_file, flags, skip, settings)
    check_target(output_dir, overwrite=overwrite)
    say = Progress(quiet=quiet, verbose=verbose)
    model = load_model(source)
    for notice in model.notices:
        say.line(notice)
    say.config(config)
    calibration_set = collect_cached(
        model, on_progress=say.collecting, **{key: getattr(config, key) for key in COLLECT_KEYS}
    )
    unfinished = output_dir.with_name(output_dir.name + ".partial")
    if not resume:
        shutil.rmtree(unfinished, ignore_errors=True)
    with say.units():
        quantized = calibrate(
            model.unet, config, calibration_set, model_id=model.id, run_directory=unfinished, on_unit=say.unit
        )
    say.line("Measuring against full precision, from noise that calibration has not seen")
    reference = make_reference(
        model, samples=EVALUATION_SAMPLES, num_inference_steps=config.num_inference_steps, seed=config.seed
    )
    learned = compare(reference, quantized, config.seed)
    with quantized.intervals(quantized.static):
        static = compare(reference, quantized, config.seed)
    quantized.metrics = {
        "samples": EVALUATION_SAMPLES,
        "num_inference_steps": config.num_inference_steps,
        "learned": learned.to_dict(),
        "static": static.to_dict(),
    }
    quantized.save_pretrained(output_dir, overwrite=overwrite)
    shutil.rmtree(unfinished, ignore_errors=True)
    say.result(output_dir, config, learned, static, time.perf_counter() - began)
    if as_json:
        print_json({"output_dir": str(output_dir), **quantized.metrics})


def _resolve(
    name: str, file: Path | None, flags: dict[str, str | None], skip: tuple[str, ...], settings: tuple[str, ...]
) -> Config:
    """Preset, then config file, then flags, then ``--set``."""
    choices: dict[str, Any] = dict(read_config_file(file)) if file else {}
    name = choices.pop("preset", name)
    choices |= {key: value for key, value in flags.items() if value is not None}
    if skip:
        choices["skip"] = skip
    for text in settings:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--set takes KEY=VALUE. Got {text!r} instead.")
        choices[key.replace("-", "_")] = value
    assert set(FLAGS) <= {f.name for f in fields(Config)}
    return preset(name, **choices)
