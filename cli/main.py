"""Entry point: the command group, and how a run ends that does not end well.

Exit codes: 2 for a wrong request, 1 for a failure, 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP.
"""

from __future__ import annotations

import errno
import os
import signal
import stat
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from importlib import import_module
from io import TextIOWrapper
from types import FrameType
from typing import Any, NoReturn

import click
from click.shell_completion import CompletionItem

import ptq_tdq
from ptq_tdq import launch
from ptq_tdq.errors import ModelError, PtqTdqError, UsageError, WorkerError, of_memory, printable
from ptq_tdq.files import reason

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
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
UNWRITABLE = (*FULL, errno.EPIPE, errno.EIO)  # where stdout leads
NO_FOLDER = (errno.ENOENT, None)  # number and file of the error where none is usable for temporary files
STDOUT = "<stdout>"  # what its errors name as their file
NO_MEMORY = "There is too little memory for this; free some, or ask for less at once."
MOST = 1000  # characters of an error
HANGUP = getattr(signal, "SIGHUP", None)  # where a system has it
WAIT, WAITS = 0.1, 300  # seconds that a stop waits for an import, and how often
SHARED = ("calibrate", "finetune")  # commands that several processes run as one


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
@click.pass_context
def cli(context: click.Context) -> None:
    """Quantize trained diffusion models to few bits, with activation intervals that follow the time step."""
    name = context.invoked_subcommand
    if launch.launched() > 1 and name not in SHARED:
        instead = "; --workers and --shard share a study" if name == "benchmark" else ""
        raise UsageError(
            f"{name} runs in one process; start it without torchrun or accelerate launch{instead} "
            f"(WORLD_SIZE is {launch.launched()})."
        )
    import torch  # takes a second, and --help needs none of it

    torch.set_flush_denormal(True)


def main(args: list[str] | None = None) -> None:
    """Run the command line; errors raised on purpose become one line on stderr (with -v also a traceback)."""
    state: dict[str, Any] = {}
    _prepare_streams()
    try:
        with _stoppable(), redirect_stdout(_Named(sys.stdout, STDOUT)):
            cli.main(args, prog_name="ptq-tdq", standalone_mode=False, obj=state)
            sys.stdout.flush()
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(2)
    except click.ClickException as error:
        command = getattr(getattr(error, "ctx", None), "command_path", "ptq-tdq")
        _fail(f"{error.format_message()} See `{command} --help`.", 2, told=launch.is_first_here())
    except (click.Abort, KeyboardInterrupt) as stop:  # click makes an Abort of the interrupt
        if launch.is_first():
            click.echo(state.get("on_stop", "Stopped."), err=True)
        sys.exit(128 + getattr(stop.__cause__ or stop, "number", signal.SIGINT))
    except PtqTdqError as error:
        if state.get("verbose"):
            traceback.print_exc()
        if isinstance(error, ModelError) and of_memory(error):  # which a file that cannot be loaded is taken for
            _fail(NO_MEMORY, 1, told=True)
        told = isinstance(error, WorkerError) or (launch.is_first() if error.reported else launch.is_first_here())
        _fail(str(error), 2 if isinstance(error, UsageError) else 1, told=told)
    except Exception as error:
        if of_memory(error):
            _fail(NO_MEMORY, 1, told=True)
        if isinstance(error, OSError):
            _fail_to_write(error)
        raise


def _fail_to_write(error: OSError) -> NoReturn:
    """End a command whose result, or whose temporary files, had no place; outputs have errors of their own."""
    if error.filename == STDOUT and error.errno in UNWRITABLE:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing is left to say, not even at exit
        if isinstance(error, BrokenPipeError):  # the reader of a pipe has seen enough
            sys.exit(1)
        what, advice = "The result", "send stdout elsewhere, or free some space"
    elif error.errno in FULL or (error.errno, error.filename) == NO_FOLDER:
        what = "A temporary file" if error.filename is None else f"'{error.filename}'"
        advice = "free some space, or set TMPDIR to a folder that has some"
    else:
        raise error
    _fail(f"{what} cannot be written ({reason(error)}); {advice}.", 1, told=True)


class _Named:
    """A stream whose errors name it, as those of files do."""

    def __init__(self, stream: Any, name: str) -> None:
        self._stream, self._name = stream, name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> Any:
        return self._named(self._stream.write, text)

    def flush(self) -> None:
        self._named(self._stream.flush)

    def _named(self, call: Callable[..., Any], *args: Any) -> Any:
        try:
            return call(*args)
        except OSError as error:
            error.filename = self._name
            raise


def _prepare_streams() -> None:
    """Streams that this process was started without lead nowhere, and no file that is opened gets their numbers.

    What stdout cannot encode, such as a path that is no text, is spelled out, as on stderr.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    if isinstance(sys.stdout, TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


class _Stopped(KeyboardInterrupt):
    """Ctrl-C, SIGTERM or SIGHUP, by its ``number``."""

    def __init__(self, number: int) -> None:
        self.number = number


@contextmanager
def _stoppable() -> Iterator[None]:
    """Ctrl-C, SIGTERM and SIGHUP (the terminal was closed) stop the body, and what comes then as before. They wait for
    the end of an import: libraries take what is raised in one for a sign that something is missing, and go on without
    it.
    """
    waits: list[threading.Timer] = []

    def stop(number: int, frame: FrameType | None) -> None:
        if len(waits) == WAITS or not _importing(frame):
            if number == HANGUP:
                _leave_terminal()
            raise _Stopped(number)
        waits.append(threading.Timer(WAIT, os.kill, (os.getpid(), number)))
        before.callback(waits[-1].cancel)
        waits[-1].start()

    with ExitStack() as before:
        if threading.current_thread() is threading.main_thread():  # the only one that may
            for number in filter(None, (signal.SIGTERM, signal.SIGINT, HANGUP)):
                if (handler := signal.getsignal(number)) is not signal.SIG_IGN:
                    before.callback(signal.signal, number, handler or signal.SIG_DFL)
                    signal.signal(number, stop)
        yield


def _leave_terminal() -> None:
    """Send nowhere what goes to a terminal: it was closed, and writing to it fails."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for number in (1, 2):
        if stat.S_ISCHR(os.fstat(number).st_mode):
            os.dup2(nowhere, number)
    os.close(nowhere)


def _importing(frame: FrameType | None) -> bool:
    """Whether a frame, or one that has called it since the command began, imports something."""
    while frame is not None and frame.f_code is not main.__code__:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


def _fail(message: str, code: int, *, told: bool) -> NoReturn:
    """End with an error; ``told`` by the first of several processes, of a machine where others may not know of it."""
    if told:
        text = printable(" ".join(message.split()))
        if len(text) > MOST:  # of something that was given: what is wrong comes before it, what to do behind
            text = f"{text[: MOST // 2]} [...] {text[-MOST // 2 :]}"
        click.echo("Error: " + text, err=True)
    sys.exit(code)
