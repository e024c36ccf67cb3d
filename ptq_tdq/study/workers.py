"""Processes that run cells: each has a model, a share of the threads and, where the system allows, cores of its own."""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from ptq_tdq.calib_data import load_model
from ptq_tdq.errors import PtqTdqError, WorkerError
from ptq_tdq.study.cell import run_cell
from ptq_tdq.study.facts import facts
from ptq_tdq.study.matrix import Cell

Event = tuple[str, Any]  # ("say", text), ("done", line) or ("error", exception)


@dataclass(frozen=True)
class Job:
    """What every cell of a study needs to know; ``given`` are the arguments of :func:`load_model`."""

    source: str | None
    given: Mapping[str, Any]
    work: Path
    command: str
    grids: Path | None


class Runner:
    """Takes one cell at a time; events come in pairs of worker and event from :func:`events`."""

    def __init__(self, process: BaseProcess, pipe: Connection) -> None:
        self.process, self.pipe = process, pipe

    def start(self, cell: Cell) -> None:
        self.pipe.send(cell)


@contextmanager
def workers(job: Job, count: int) -> Iterator[list[Runner]]:
    """``count`` processes, each with its share of this process's threads; they end with the block or with it."""
    share = max(1, torch.get_num_threads() // count)
    context = mp.get_context("spawn")  # a fork would copy torch's thread pools in an unusable state
    runners = []
    try:
        for cores in _cores(count, share):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, job, share, cores), daemon=True)
            process.start()
            there.close()
            runners.append(Runner(process, here))
        yield runners
    finally:
        for runner in runners:
            runner.process.terminate()
        for runner in runners:
            runner.process.join()


def events(busy: Sequence[Runner]) -> Iterator[tuple[Runner, Event]]:
    """Wait until busy workers report; raises :class:`WorkerError` for one that is gone."""
    by_pipe: dict[Any, Runner] = {runner.pipe: runner for runner in busy}
    for pipe in wait(list(by_pipe)):
        try:
            yield by_pipe[pipe], by_pipe[pipe].pipe.recv()
        except (EOFError, ConnectionError):
            process = by_pipe[pipe].process
            process.join()
            raise WorkerError(
                f"A worker process ended with code {process.exitcode}, perhaps for lack of memory; the same command "
                "goes on after the last finished cell, fewer --workers need less memory."
            ) from None


def run_here(job: Job, cells: Sequence[Cell], say: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """Run cells in this process, one after the other."""
    model = load_model(job.source, **job.given)
    for cell in cells:
        yield {**run_cell(model, cell, job.work, say, grids=job.grids), "facts": facts(job.command)}


def _cores(count: int, share: int) -> list[list[int]]:
    """Cores of each worker; empty where there are too few or the system cannot pin."""
    available = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if len(available) < count * share:
        return [[] for _ in range(count)]
    return [available[i * share : (i + 1) * share] for i in range(count)]


def _serve(pipe: Connection, job: Job, threads: int, cores: list[int]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if cores:
        os.sched_setaffinity(0, cores)
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    try:
        model = load_model(job.source, **job.given)
        while True:
            cell: Cell = pipe.recv()
            line = run_cell(model, cell, job.work, lambda text: pipe.send(("say", text)), grids=job.grids)
            pipe.send(("done", {**line, "facts": facts(job.command)}))
    except (EOFError, ConnectionError):  # the parent is gone
        return
    except PtqTdqError as error:
        pipe.send(("error", error))


def _end_with_parent() -> None:
    """A parent that is killed cannot end its workers, so they watch it."""
    parent = mp.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
