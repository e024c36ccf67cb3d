"""``ptq-tdq benchmark``: which method and bit width, for a matrix of them."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from ptq_tdq.atomic import FileKind, alone, check_file_target, check_folder, write_atomic
from ptq_tdq.calib_data import LoadedModel, is_embedded, load_model
from ptq_tdq.cli.cells import CellBars
from ptq_tdq.cli.options import (
    FilePath,
    backend_option,
    json_option,
    model_options,
    print_json,
    quiet_option,
    refuse_others,
    threads_option,
    verbose_option,
)
from ptq_tdq.config import PRESETS
from ptq_tdq.errors import ConfigError, UsageError
from ptq_tdq.evaluate.names import INCEPTION, METRICS, Metric
from ptq_tdq.load import Backend
from ptq_tdq.study.cell import cell_line, check_plans, sampling_sha256
from ptq_tdq.study.matrix import METHODS, make_cells
from ptq_tdq.study.render import (
    USUAL,
    Table,
    differences,
    find_metric,
    listing,
    make_table,
    markdown,
    require_comparable,
    to_csv,
    usual_metric,
)
from ptq_tdq.study.results import read_lines, unfinished
from ptq_tdq.study.run import run_study, work_folder

FORMATS: dict[str, Callable[[Sequence[Table]], str]] = {
    "markdown": lambda tables: "\n".join(map(markdown, tables)),
    "list": listing,
    "csv": lambda tables: to_csv(tables[0]),
}
DRAWING = ("render", "flags", "form", "output", "against", "threads", "as_json", "verbose", "quiet")
TABLE = FileKind("a table of a study", rb"\*\*[^\n]* is better\)|\| preset \| scheme |preset,scheme,metric,")


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
    help=f"What the table shows, parted by commas (csv: one): {', '.join(metric.flag for metric in METRICS)}.  "
    f"[default: the first that was measured of {', '.join(USUAL)}]",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(list(FORMATS)),
    default="markdown",
    show_default=True,
    help="markdown: a column per method; list: a line per method, a column per metric.",
)
@click.option(
    "--output", type=FilePath(dir_okay=False), help="Write the table here, not to stdout; an earlier one is replaced."
)
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
@json_option
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
    flags: str | None,
    form: str,
    output: Path | None,
    grids: Path | None,
    render: Path | None,
    against: str | None,
    as_json: bool,
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
    metrics = None if flags is None else _metrics(flags, form)
    if output:
        check_file_target(output, TABLE, [render or results])
    if render:
        refuse_others(DRAWING, "--render runs no cells")
        if not render.exists():
            raise UsageError(f"There is no results file '{render}'; run the study first.")
        _give(render, metrics, against, form, output, as_json=as_json, quiet=quiet)
        return
    cells = make_cells(_names(presets), _names(schemes), _names(methods), _numbers(seeds), settings, samples, backend)
    context.with_resource(alone(work_folder(results)))
    every = cells
    if shard:
        if output:
            raise UsageError("--output takes the table of all shards; join their files and give them to --render.")
        cells = cells[shard]
    lines = read_lines(results)
    model = load_model(source, **given)
    left = unfinished(cells, lines, model.sha256, sampling_sha256(model))
    _check_measured(metrics or [], model)
    require_comparable([*lines, *(cell_line(model, cell) for cell in every)], against)
    if grids:
        check_folder(grids)
    # all that can make a plan impossible
    plans = {(c.config.layers.skip, c.config.layers.float_layers, c.config.layers.attention): c.config for c in left}
    check_plans(model, list(plans.values()))
    context.ensure_object(dict)["on_stop"] = "Stopped; the same command goes on after the last finished cell."
    with CellBars(left, lines, workers, quiet=quiet, verbose=verbose, total=len(cells)) as bars:
        command = shlex.join(["ptq-tdq", *sys.argv[1:]])
        run_study(
            left, results, source=source, given=given, command=command, count=workers, grids=grids,
            on_line=bars.finished, on_say=bars.now,
        )  # fmt: skip
    _give(results, [] if shard else metrics, against, form, output, as_json=as_json, quiet=quiet)


def _metrics(flags: str, form: str) -> list[Metric]:
    """The metrics of ``--metric``, as many as the form of the table takes."""
    metrics = [find_metric(flag) for flag in _names(flags)]
    if not metrics:
        raise UsageError("--metric names no metric; give one, for example fd-c10.")
    if form == "csv" and len(metrics) > 1:
        raise UsageError("--format csv takes one --metric; give one, or choose another format.")
    return metrics


def _check_measured(metrics: Sequence[Metric], model: LoadedModel) -> None:
    """Raise :class:`UsageError` for what a study of this model does not measure."""
    for metric in metrics:
        if metric.key in INCEPTION or ("c10" in metric.key and not is_embedded(model)):
            raise UsageError(f"A study of this model has no {metric.flag}; choose another --metric.")


def _give(
    results: Path,
    metrics: list[Metric] | None,
    against: str | None,
    form: str,
    output: Path | None,
    *,
    as_json: bool,
    quiet: bool,
) -> None:
    """The tables of a results file, one for each metric (None: the usual one); none of a shard."""
    lines = read_lines(results)
    wanted = [usual_metric(lines)] if metrics is None else metrics
    tables = [make_table(lines, metric, against) for metric in wanted]
    if output and tables:
        write_atomic(output, FORMATS[form](tables).encode())
        click.echo(f"Wrote {output}", err=True)
    if as_json:
        print_json({"results": str(results), "cells": len(lines), "tables": [_document(table) for table in tables]})
    elif tables and not output and not quiet:
        click.echo(FORMATS[form](tables), nl=False)


def _document(table: Table) -> dict[str, Any]:
    """A table as JSON data: one entry for each row and method, with its values by seed."""
    changes = differences(table)
    entries = [
        {
            "preset": row[0],
            "scheme": row[1],
            "method": method,
            "mean": entry.mean,
            "deviation": entry.deviation,
            **asdict(entry),
            "difference": asdict(changes[row, method]) if (row, method) in changes else None,
        }
        for row, found in table.rows.items()
        for method, entry in found.items()
    ]
    return {"metric": table.metric.key, "compared_with": table.compared_with, "entries": entries}


def _names(text: str) -> list[str]:
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def _numbers(text: str) -> list[Any]:
    try:
        return [int(part) for part in _names(text)]
    except ValueError:
        raise ConfigError(f"--seeds takes numbers, for example 0,1,2. Got {text!r} instead.") from None
