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
from pathlib import Path
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
def running(*arguments: object, folder: Path = Path(), **environment: str) -> Iterator[Command]:
    """A command in ``folder`` that is killed where the block ends before it does."""
    with TemporaryFile("w+") as out, TemporaryFile("w+") as err:
        given = ([str(argument) for argument in arguments], folder, environment, out, err)
        process = multiprocessing.get_context("fork").Process(target=_run, args=given)
        process.start()
        try:
            yield Command(process, out, err)
        finally:
            process.kill()
            process.join()


@contextmanager
def launched(count: int, *arguments: object, machines: Sequence[Path] = ()) -> Iterator[list[Command]]:
    """The same command in ``count`` processes, which know of each other as those of ``torchrun`` do.

    All are on this machine, or each is the only one of a machine of its own, where it begins in that folder.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": "1" if machines else str(count)}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": "0" if machines else str(rank)} for rank in range(count)]
    folders = machines or [Path()] * count
    with ExitStack() as stack:
        yield [
            stack.enter_context(running(*arguments, folder=folder, **common, **rank))
            for folder, rank in zip(folders, ranks, strict=True)
        ]


def _run(arguments: Sequence[str], folder: Path, environment: dict[str, str], out: IO[str], err: IO[str]) -> None:
    os.chdir(folder)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell ignores Ctrl-C
    os.environ |= environment
    faulthandler.enable(err)
    try:
        with redirect_stdout(out), redirect_stderr(err):
            main(arguments)
    finally:
        out.flush()
        err.flush()
