"""The command line in processes of its own: forked, so nothing is imported again."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from tempfile import TemporaryFile
from time import sleep
from typing import IO

from ptq_tdq.cli.main import main


@dataclass(frozen=True)
class Command:
    """``ptq-tdq`` as a user runs it beside this process."""

    process: BaseProcess
    out: IO[str]
    err: IO[str]

    def wait_for(self, seen: Callable[[], bool]) -> None:
        """Until something is seen, or the command has ended."""
        while self.process.is_alive() and not seen():
            sleep(0.002)

    def send(self, number: signal.Signals) -> None:
        assert self.process.pid
        os.kill(self.process.pid, number)

    def end(self) -> tuple[int | None, str, str]:
        """The exit code, or the signal as a negative number; what was written to stdout and to stderr."""
        self.process.join()
        for file in (self.out, self.err):
            file.seek(0)
        return self.process.exitcode, self.out.read(), self.err.read()


@contextmanager
def running(*arguments: object, **environment: str) -> Iterator[Command]:
    """A command that is killed where the block ends before it does."""
    with TemporaryFile("w+") as out, TemporaryFile("w+") as err:
        given = ([str(argument) for argument in arguments], environment, out, err)
        process = multiprocessing.get_context("fork").Process(target=_run, args=given)
        process.start()
        try:
            yield Command(process, out, err)
        finally:
            process.kill()
            process.join()


@contextmanager
def launched(count: int, *arguments: object) -> Iterator[list[Command]]:
    """The same command in ``count`` processes, which know of each other as those of ``torchrun`` do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(count))
    ranks = [dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank)) for rank in range(count)]
    with ExitStack() as stack:
        yield [stack.enter_context(running(*arguments, **common, **rank)) for rank in ranks]


def _run(arguments: Sequence[str], environment: dict[str, str], out: IO[str], err: IO[str]) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell ignores Ctrl-C
    os.environ |= environment
    faulthandler.enable(err)
    try:
        with redirect_stdout(out), redirect_stderr(err):
            main(arguments)
    finally:
        out.flush()
        err.flush()
