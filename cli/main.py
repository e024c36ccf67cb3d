"""Entry point: the command group, and how a run ends that does not end well.

Exit codes: 2 for a wrong request, 1 for a failure, 130 for Ctrl-C, 143 for SIGTERM.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from importlib import import_module
from typing import Any

import click
from click.shell_completion import CompletionItem

import ptq_tdq
from ptq_tdq.errors import PtqTdqError, UsageError, WorkerError, printable

COMMANDS = {
    "benchmark": "Calibrate and measure every method x scheme x preset x seed, and draw a table.",
    "calibrate": "Quantize the denoiser of a diffusion model and write its interval tables.",
    "choices": "List the choices of calibrate, or of finetune, with their meanings.",
    "doctor": "Show what this processor, its compiler and the installed packages can do.",
    "evaluate": "Measure what ARTIFACT loses against its full-precision model.",
    "export": "Write ARTIFACT for other programs.",
    "finetune": "Train the weights and intervals of ARTIFACT together.",
    "inspect": "Show model, choices, sizes, and each quantizer of ARTIFACT.",
    "report": "Draw each ARTIFACT: intervals, distributions, errors, samples.",
    "sample": "Sample with each ARTIFACT and with the full-precision model, from the same noise, into a PNG.",
}
"""Each command, in the file of its name, with the first sentence of its help; the file is imported when it runs."""


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command: click.Command = getattr(import_module(f"ptq_tdq.cli.{name}"), f"{name}_command")
        return command

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Names of commands as listed: a shell asks at each key, and importing them takes seconds."""
        found = [CompletionItem(name, help=text) for name, text in COMMANDS.items() if name.startswith(incomplete)]
        return [*found, *click.Command.shell_complete(self, ctx, incomplete)]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(ptq_tdq.__version__, prog_name="ptq-tdq")
def cli() -> None:
    """Quantize trained diffusion models to few bits, with activation intervals that follow the time step."""
    import torch  # takes a second, and --help needs none of it

    torch.set_flush_denormal(True)


def main(args: list[str] | None = None) -> None:
    """Run the command line; errors raised on purpose become one line on stderr (with -v also a traceback)."""
    state: dict[str, Any] = {}
    if threading.current_thread() is threading.main_thread():  # the only one that may
        signal.signal(signal.SIGTERM, _terminate)
    try:
        cli.main(args, prog_name="ptq-tdq", standalone_mode=False, obj=state)
        sys.stdout.flush()
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(2)
    except click.ClickException as error:
        command = getattr(getattr(error, "ctx", None), "command_path", "ptq-tdq")
        _fail(f"{error.format_message()} See `{command} --help`.", 2)
    except (click.Abort, KeyboardInterrupt) as stop:  # click makes an Abort of the interrupt
        _tell(state.get("on_stop", "Stopped."))
        sys.exit(143 if isinstance(stop.__cause__ or stop, _Terminated) else 130)
    except BrokenPipeError:  # the reader of a pipe has seen enough; nothing is left to say, not even at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except PtqTdqError as error:
        if state.get("verbose"):
            traceback.print_exc()
        _fail(str(error), 2 if isinstance(error, UsageError) else 1, of_one=isinstance(error, WorkerError))


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which stops a run as Ctrl-C does."""


def _terminate(number: int, frame: Any) -> None:
    raise _Terminated


def _fail(message: str, code: int, *, of_one: bool = False) -> None:
    _tell("Error: " + printable(" ".join(message.split())), of_one=of_one)
    sys.exit(code)


def _tell(text: str, *, of_one: bool = False) -> None:
    """Say how the run ends; of several processes the first one does, but for what concerns one of them."""
    if of_one or int(os.environ.get("WORLD_SIZE", "1")) == 1 or os.environ.get("RANK", "0") == "0":
        click.echo(text, err=True)
