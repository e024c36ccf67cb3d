"""Entry point: the command group, and how errors end a run (2 for a wrong request, 1 for a failure)."""

from __future__ import annotations

import os
import sys
import traceback
from typing import Any

import click
import torch

import ptq_tdq
from ptq_tdq.cli.benchmark import benchmark_command
from ptq_tdq.cli.calibrate import calibrate_command
from ptq_tdq.cli.evaluate import evaluate_command
from ptq_tdq.cli.export import export_command
from ptq_tdq.cli.inspect import inspect_command
from ptq_tdq.cli.report import report_command
from ptq_tdq.cli.sample import sample_command
from ptq_tdq.errors import PtqTdqError, UsageError


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(ptq_tdq.__version__, prog_name="ptq-tdq")
def cli() -> None:
    """Quantize trained diffusion models to few bits, with activation intervals that follow the time step."""
    torch.set_flush_denormal(True)


for _command in (
    benchmark_command,
    calibrate_command,
    evaluate_command,
    export_command,
    inspect_command,
    report_command,
    sample_command,
):
    cli.add_command(_command)


def main(args: list[str] | None = None) -> None:
    """Run the command line; errors raised on purpose become one line on stderr (with -v also a traceback)."""
    state: dict[str, Any] = {}
    try:
        cli.main(args, prog_name="ptq-tdq", standalone_mode=False, obj=state)
        sys.stdout.flush()
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(2)
    except click.ClickException as error:
        command = getattr(getattr(error, "ctx", None), "command_path", "ptq-tdq")
        _fail(f"{error.format_message()} See `{command} --help`.", 2)
    except (click.Abort, KeyboardInterrupt):
        click.echo(state.get("on_stop", "Stopped."), err=True)
        sys.exit(1)
    except BrokenPipeError:  # the reader of a pipe has seen enough; nothing is left to say, not even at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except PtqTdqError as error:
        if state.get("verbose"):
            traceback.print_exc()
        _fail(str(error), 2 if isinstance(error, UsageError) else 1)


def _fail(message: str, code: int) -> None:
    click.echo("Error: " + " ".join(message.split()), err=True)
    sys.exit(code)
