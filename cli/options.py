"""Flags that several commands share."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

import click
import torch

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

model_option: Decorator = click.option(
    "--model",
    "source",
    metavar="FOLDER|HUB_ID",
    help="A local diffusers folder that holds a UNet2DModel, or a hub id.  [default: the embedded CIFAR-10 model]",
)
json_option: Decorator = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
verbosity_options: tuple[Decorator, ...] = (
    click.option("-v", "--verbose", is_flag=True, help="Say more; show a traceback for errors."),
    click.option("-q", "--quiet", is_flag=True, help="Say nothing but the result of --json and errors."),
)


def _set_threads(context: click.Context, parameter: click.Parameter, value: int) -> int:
    torch.set_num_threads(value)
    return value


threads_option: Decorator = click.option(
    "--threads",
    type=click.IntRange(min=1),
    default=lambda: os.cpu_count() or 1,
    show_default="all cores",
    callback=_set_threads,
    expose_value=False,
    help="CPU threads; the last digits of a result depend on them.",
)


def verbosity(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add -v and -q."""
    for option in reversed(verbosity_options):
        command = option(command)
    return command


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    click.echo(json.dumps(value, indent=2, sort_keys=True))
