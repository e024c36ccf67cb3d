"""Flags and output that several commands share."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

import click
import torch
from rich.console import Console

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

UNLIMITED = 1000  # columns; a table takes only what it needs


def _set_threads(context: click.Context, parameter: click.Parameter, value: int) -> int:
    torch.set_num_threads(value)
    return value


def _set_verbose(context: click.Context, parameter: click.Parameter, value: bool) -> bool:
    context.ensure_object(dict)["verbose"] = value  # the entry point reads it when an error ends the run
    return value


model_option: Decorator = click.option(
    "--model",
    "source",
    metavar="FOLDER|HUB_ID",
    help="A local diffusers folder that holds a UNet2DModel, or a hub id.  [default: the embedded CIFAR-10 model]",
)
original_option: Decorator = click.option(
    "--model",
    "source",
    metavar="FOLDER|HUB_ID",
    help="The full-precision model.  [default: the one that the artifact was made from]",
)
steps_option: Decorator = click.option(
    "--num-inference-steps", type=click.IntRange(min=1), default=25, show_default=True, help="Steps of the sampler."
)
scheduler_option: Decorator = click.option(
    "--scheduler",
    metavar="CLASS",
    help="Any diffusers scheduler, e.g. EulerDiscreteScheduler.  [default: the model's own]",
)
json_option: Decorator = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
backend_option: Decorator = click.option(
    "--backend",
    type=click.Choice(["simulated", "integer"]),
    default="simulated",
    show_default=True,
    help="Floating point on the integer grid, or integer arithmetic (fast).",
)
verbose_option: Decorator = click.option(
    "-v", "--verbose", is_flag=True, callback=_set_verbose, help="Say more; show a traceback for errors."
)
quiet_option: Decorator = click.option(
    "-q", "--quiet", is_flag=True, help="Say nothing but errors and the result of --json."
)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


threads_option: Decorator = click.option(
    "--threads",
    type=click.IntRange(min=1),
    default=_cores,
    show_default="the cores that this process may use",
    callback=_set_threads,
    expose_value=False,
    help="CPU threads; the last digits of a result depend on them.",
)


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    click.echo(json.dumps(value, indent=2, sort_keys=True, allow_nan=False))


def result_console() -> Console:
    """Where results are drawn: stdout, as wide as the terminal; a file or a pipe gets every column in full."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=UNLIMITED)
