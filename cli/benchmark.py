"""``ptq-tdq benchmark``: which method and bit width, for a matrix of them."""

from __future__ import annotations

import re
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ptq_tdq.artifacts import alone, check_folder, write_atomic
from ptq_tdq.calib_data import load_model
from ptq_tdq.cli.options import FilePath, backend_option, model_options, quiet_option, threads_option, verbose_option
from ptq_tdq.config import PRESETS
from ptq_tdq.errors import ConfigError, UsageError
from ptq_tdq.evaluate.names import METRICS, Metric
from ptq_tdq.load import Backend
from ptq_tdq.study.cell import check_plans, sampling_sha256
from ptq_tdq.study.matrix import METHODS, Cell, make_cells
from ptq_tdq.study.render import Table, find_metric, listing, make_table, markdown, require_comparable, title, to_csv
from ptq_tdq.study.results import Line, read_lines, unfinished
from ptq_tdq.study.run import run_study, seconds_left, work_folder

FORMATS: dict[str, Callable[[Sequence[Table]], str]] = {
    "markdown": lambda tables: "\n".join(map(markdown, tables)),
    "list": listing,
    "csv": lambda tables: to_csv(tables[0]),
}


class Shard(click.ParamType[slice]):
    """I/N: every N-th, from the I-th."""

    name = "shard"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> slice:
        found = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", value) if isinstance(value, str) else None
        if not found or int(found[1]) >= int(found[2]):
            self.fail(f"{value!r} is no shard; write I/N with I from 0 to N - 1, such as 0/4.", param, ctx)
        return slice(int(found[1]), None, int(found[2]))


@click.command("benchmark")
@model_options
@click.option("--presets", metavar="NAMES", default="default", show_default=True, help=f"Of {', '.join(PRESETS)}.")
@click.option("--schemes", metavar="NAMES", default="W4A8,W4A6", show_default=True, help="Bit widths.")
@click.option(
    "--methods",
    metavar="NAMES",
    default=",".join(METHODS),
    show_default=True,
    help="Methods; with choices of its own a method is a column too: tdq-thin:bias_lr=0+eight_bit_layers=first/last.",
)
@click.option("--seeds", metavar="NUMBERS", default="0,1,2", show_default=True, help="Seeds.")
@click.option(
    "--samples",
    type=click.IntRange(8, 1 << 20),
    default=1000,
    show_default=True,
    help="Samples that a cell is measured on.",
)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="[PRESET:]KEY=VALUE",
    help="Any choice of calibrate --set, for all presets or for one; num_inference_steps holds for the samples too.",
)
@click.option(
    "--results",
    type=FilePath(dir_okay=False),
    default=Path("benchmark.jsonl"),
    show_default=True,
    help="The file of finished cells; the same command goes on after them.",
)
@click.option(
    "--shard",
    type=Shard(),
    metavar="I/N",
    help="Run only every N-th cell, from the I-th (0 to N - 1), into a results file of its own; the files of all, "
    "joined by cat, are that of the whole run.",
)
@backend_option
@click.option(
    "--workers", type=click.IntRange(1, 1024), default=1, show_default=True, help="Processes; they share --threads."
)
@click.option(
    "--metric",
    "flags",
    metavar="NAMES",
    default="fd-c10",
    show_default=True,
    help=f"What the table shows, parted by commas (csv: one): {', '.join(metric.flag for metric in METRICS)}.",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(list(FORMATS)),
    default="markdown",
    show_default=True,
    help="markdown: a column per method; list: a line per method, a column per metric.",
)
@click.option("--output", type=FilePath(dir_okay=False), help="Write the table here, not to stdout.")
@click.option(
    "--grids",
    type=FilePath(file_okay=False),
    help="Save a picture of the first samples of each cell that runs, beside full precision's, in this folder.",
)
@click.option("--render", type=FilePath(dir_okay=False), help="Only draw the table of this results file.")
@click.option(
    "--against",
    metavar="PRESET[:METHOD]",
    help="Compare every row with this preset's METHOD (S_1 if not named); :METHOD alone: with its own preset's.  "
    "[default: :S_1]",
)
@threads_option
@verbose_option
@quiet_option
@click.pass_context
def benchmark_command(
    context: click.Context,
    /,
    source: str | None,
    presets: str,
    schemes: str,
    methods: str,
    seeds: str,
    samples: int,
    settings: tuple[str, ...],
    results: Path,
    shard: slice | None,
    backend: Backend,
    workers: int,
    flags: str,
    form: str,
    output: Path | None,
    grids: Path | None,
    render: Path | None,
    against: str | None,
    verbose: bool,
    quiet: bool,
    **given: Any,
) -> None:
    """Calibrate and measure every method x scheme x preset x seed, and draw a table.

    Each finished cell is a line of the results file; a run that was stopped goes on when the same command is given
    again. Cells that differ only in activations share their weights. Each seed has its own calibration set and noise;
    methods are compared with S_1 (Q-Diffusion), or what --against names, on the same seed. With the integer backend the
    samples come from integer arithmetic; methods without tables (dynamic) stay simulated, as their lines say.
    """
    metrics = [find_metric(flag) for flag in _names(flags)]
    if not metrics:
        raise UsageError("--metric names no metric; give one, for example fd-c10.")
    if form == "csv" and len(metrics) > 1:
        raise UsageError("--format csv takes one --metric; give one, or choose another format.")
    if render:
        if grids:
            raise UsageError("--render runs no cells, so there are no pictures for --grids; leave one of them out.")
        if not render.exists():
            raise UsageError(f"There is no results file '{render}'; run the study first.")
        _give(read_lines(render), metrics, against, form, output)
        return
    cells = make_cells(_names(presets), _names(schemes), _names(methods), _numbers(seeds), settings, samples, backend)
    context.with_resource(alone(work_folder(results)))
    planned = [{"preset": c.preset, "method": c.method, "evaluation": c.evaluation} for c in cells]
    if shard:
        if output:
            raise UsageError("--output takes the table of all shards; join their files and give them to --render.")
        cells = cells[shard]
    lines = read_lines(results)
    model = load_model(source, **given)
    left = unfinished(cells, lines, model.sha256, sampling_sha256(model))
    require_comparable([*lines, *planned], against)
    if grids:
        check_folder(grids)
    # all that can make a plan impossible
    plans = {(c.config.skip, c.config.float_layers, c.config.attention): c.config for c in left}
    check_plans(model, list(plans.values()))
    context.ensure_object(dict)["on_stop"] = "Stopped; the same command goes on after the last finished cell."
    with _Bars(left, lines, workers, quiet=quiet, verbose=verbose, total=len(cells)) as bars:
        command = shlex.join(["ptq-tdq", *sys.argv[1:]])
        run_study(
            left, results, source=source, given=given, command=command, count=workers, grids=grids,
            on_line=bars.finished, on_say=bars.now,
        )  # fmt: skip
    if not shard and (not quiet or output):
        _give(read_lines(results), metrics, against, form, output)


class _Bars:
    """Cells done, what each worker does, and the time left: a bar on a terminal, a line per cell with -v."""

    def __init__(
        self, left: list[Cell], lines: list[Line], workers: int, *, quiet: bool, verbose: bool, total: int
    ) -> None:
        self.left, self.lines, self.workers, self.verbose = list(left), list(lines), workers, verbose
        self.console = Console(stderr=True, quiet=quiet, highlight=False)
        self.doing: dict[int, str] = {}
        self.bars = Progress(
            TextColumn("cells"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=self.console, disable=quiet or not self.console.is_terminal,
        )  # fmt: skip
        self.task = self.bars.add_task("", total=total, completed=total - len(left), note="")

    def __enter__(self) -> _Bars:
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


def _give(lines: list[Line], metrics: list[Metric], against: str | None, form: str, output: Path | None) -> None:
    text = FORMATS[form]([make_table(lines, metric, against) for metric in metrics])
    if output:
        write_atomic(output, text.encode())
        click.echo(f"Wrote {output}", err=True)
    else:
        click.echo(text, nl=False)


def _names(text: str) -> list[str]:
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def _numbers(text: str) -> list[Any]:
    try:
        return [int(part) for part in _names(text)]
    except ValueError:
        raise ConfigError(f"--seeds takes numbers, for example 0,1,2. Got {text!r} instead.") from None
