"""What ``benchmark`` tells while it runs."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ptq_tdq.study.matrix import Cell
from ptq_tdq.study.render import title
from ptq_tdq.study.results import Line
from ptq_tdq.study.run import seconds_left


class CellBars:
    """Cells done, what each worker does, and the time left: a bar on a terminal, a line per cell with -v."""

    def __init__(
        self, left: list[Cell], lines: list[Line], workers: int, *, quiet: bool, verbose: bool, total: int
    ) -> None:
        self.left, self.lines, self.workers, self.verbose = list(left), list(lines), workers, verbose
        self.console = Console(stderr=True, quiet=quiet, highlight=False)
        self.doing: dict[int, str] = {}
        self.bars = Progress(
            TextColumn("cells"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=self.console,
            disable=quiet or not self.console.is_terminal,
        )
        self.task = self.bars.add_task("", total=total, completed=total - len(left), note="")

    def __enter__(self) -> CellBars:
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def now(self, worker: int, cell: Cell, text: str) -> None:
        """What a worker does."""
        self.doing[worker] = f"{_place(cell.preset, cell.scheme, cell.method, cell.seed)}: {text}"
        self._show()

    def finished(self, line: Line) -> None:
        """A cell is in the results file."""
        key = line["preset"], line["scheme"], line["method"], line["seed"]
        self.left = [cell for cell in self.left if (cell.key, cell.evaluation) != (key, line["evaluation"])]
        self.lines.append(line)
        self.bars.advance(self.task)
        self._show()
        if self.verbose:
            how = line.get("failed") or f"{sum(line['seconds'].values()):.0f} s"
            self.console.print(f"{_place(*key)}: {how}; {self._left()}", markup=False, soft_wrap=True)

    def _show(self) -> None:
        self.bars.update(self.task, note="; ".join([self._left(), *(self.doing[i] for i in sorted(self.doing))]))

    def _left(self) -> str:
        seconds = seconds_left(self.left, self.lines, self.workers)
        if not self.left:
            return "no cell left"
        if seconds is None:
            return f"{len(self.left)} cells left"
        until = time.strftime("%H:%M", time.localtime(time.time() + seconds))
        return f"{len(self.left)} cells left, about {seconds / 60:.0f} minutes, until {until}"


def _place(preset: str, scheme: str, method: str, seed: int) -> str:
    return " ".join([part for part in (preset, scheme) if part] + [title(method), f"seed {seed}"])
