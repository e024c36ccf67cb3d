"""Entry point: the command group, and how errors end a run (2 for a wrong request, 1 for a failure)."""

from __future__ import annotations

import sys
import traceback

import click
import torch

import ptq_tdq
from ptq_tdq.cli.calibrate import calibrate_command
from ptq_tdq.cli.export import export_command
from ptq_tdq.cli.inspect import inspect_command
from ptq_tdq.cli.sample import sample_command
from ptq_tdq.errors import PtqTdqError, UsageError


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(ptq_tdq.__version__, prog_name="ptq-tdq")
def cli() -> None:
    """Quantize trained diffusion models to few bits, with activation intervals that follow the time step."""
    torch.set_flush_denormal(True)


for _command in (calibrate_command, export_command, inspect_command, sample_command):
    cli.add_command(_command)


def main(args: list[str] | None = None) -> None:
    """Run the command line; errors raised on purpose become one line on stderr (with -v also a traceback)."""
    given = sys.argv[1:] if args is None else args
    try:
        cli.main(given, standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        click.echo("Stopped. The same command goes on where it was.", err=True)
        sys.exit(1)
    except PtqTdqError as error:
        if "-v" in given or "--verbose" in given:
            traceback.print_exc()
        click.echo(f"Error: {error}", err=True)
        sys.exit(2 if isinstance(error, UsageError) else 1)
