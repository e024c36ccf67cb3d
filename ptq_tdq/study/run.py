"""Runs the unfinished cells of a study and appends each to the results file as soon as it is finished."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from ptq_tdq.study.matrix import Cell
from ptq_tdq.study.results import Line, append_line
from ptq_tdq.study.workers import Job, Runner, events, run_here, workers

OnSay = Callable[[int, Cell, str], None]  # worker, cell, what it does now
_SHARED = ("cell-*", "weights-*", "baseline-*", ".ptq-tdq-*.tmp")  # what cells, and writes that were killed, leave


def work_folder(results: Path) -> Path:
    """Where a study keeps what its cells share, until it is finished: beside the file that any link leads to."""
    target = results.resolve()
    return target.with_name(target.name + ".work")


def run_study(
    cells: Sequence[Cell],
    results: Path,
    *,
    source: str | None,
    given: Mapping[str, Any],
    command: str,
    count: int,
    grids: Path | None,
    on_line: Callable[[Line], None],
    on_say: OnSay,
) -> None:
    """Run ``cells`` in ``count`` processes (in this one for 1) and append their lines to ``results``.

    ``source`` and ``given`` are what :func:`~ptq_tdq.load_model` takes.
    Killed at any time, the lines and the shared weights stay; the remaining cells can be run again.
    """
    job = Job(source, given, work_folder(results), command, grids)
    for line in _here(job, cells, on_say) if count == 1 else _apart(job, cells, count, on_say):
        append_line(results, line)
        on_line(line)
    for folder in (found for pattern in _SHARED for found in job.work.glob(pattern)):
        shutil.rmtree(folder, ignore_errors=True)


def _here(job: Job, cells: Sequence[Cell], on_say: OnSay) -> Iterator[Line]:
    current = iter(cells)
    cell = next(current, None)

    def say(text: str) -> None:
        if cell is not None:
            on_say(0, cell, text)

    for line in run_here(job, cells, say):
        cell = next(current, None)
        yield line


def _apart(job: Job, cells: Sequence[Cell], count: int, on_say: OnSay) -> Iterator[Line]:
    waiting = list(cells)
    made: set[str] = set()
    with workers(job, min(count, max(1, len(cells)))) as runners:
        running: dict[Runner, Cell] = {}
        while waiting or running:
            for runner in runners:
                if runner not in running and (cell := next_cell(waiting, list(running.values()), made)):
                    waiting.remove(cell)
                    running[runner] = cell
                    runner.start(cell)
            for runner, (kind, value) in events(list(running)):
                if kind == "say":
                    on_say(runners.index(runner), running[runner], value)
                elif kind == "error":
                    raise value
                else:
                    made |= running.pop(runner).resources
                    yield value


def next_cell(waiting: Sequence[Cell], running: Sequence[Cell], made: set[str]) -> Cell | None:
    """The first waiting cell that needs nothing which a running cell is about to make."""
    in_the_making = set[str]().union(*(cell.resources for cell in running)) - made
    return next((cell for cell in waiting if not cell.resources & in_the_making), None)


def seconds_left(waiting: Sequence[Cell], lines: Sequence[Line], count: int) -> float | None:
    """An estimate from the finished cells of the same preset, or of all if it has none; None without any.

    The weight phase is counted once for all cells that share it.
    """
    timed = [(line["preset"], line["seconds"]) for line in lines if line.get("seconds")]
    if not timed:
        return None

    def usual(preset: str, phase: str) -> float:
        found = [(name, s[phase]) for name, s in timed if s.get(phase, 0) > 1]
        mine = [value for name, value in found if name == preset] or [value for _, value in found]
        return mean(mine) if mine else 0.0

    total, shared = 0.0, set[str]()
    for cell in waiting:
        total += usual(cell.preset, "evaluation") + (usual(cell.preset, "activations") if cell.scheme else 0.0)
        weights = {name for name in cell.resources if name.startswith("weights")} - shared
        total += len(weights) * usual(cell.preset, "weights")
        shared |= weights
    return total / count
