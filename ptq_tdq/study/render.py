"""The table of a study, from its lines alone, in the layout of supp Table 4 (a row per scheme, a column per method), or
as a list with a line per method.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean, stdev
from typing import Any

from ptq_tdq.errors import UsageError
from ptq_tdq.evaluate.names import METRICS, Metric
from ptq_tdq.study.matrix import BASELINE_METHOD, FULL_PRECISION, METHODS, label
from ptq_tdq.study.results import Line

TITLES = {"tdq": "TDQ", "tdq-thin": "TDQ_thin", BASELINE_METHOD: "S_1", FULL_PRECISION: "FP"}
USUAL = "fd-c10", "latent-sqnr", "mean-noise-sqnr"
SIGNIFICANT = 0.05
ABSENT = "-"
SIZE = "mean weight bits | mean activation bits per multiply-accumulate | MB"
TEST = (
    "95% confidence interval; p of a paired t-test, by Holm's correction for all of the metric's differences; "
    "**bold**: better with p < 0.05"
)


@dataclass(frozen=True)
class Entry:
    """A metric's values by seed, in one cell of the table; ``failed`` counts the seeds whose calibration diverged."""

    values: dict[int, float]
    failed: int = 0

    @classmethod
    def of(cls, lines: Sequence[Line], key: str) -> Entry:
        """The entry of a cell's lines."""
        given = {line["seed"]: value for line in lines if (value := line["results"].get(key)) is not None}
        return cls(given, sum("failed" in line and line["results"].get(key) is None for line in lines))

    @property
    def mean(self) -> float | None:
        return mean(self.values.values()) if self.values else None

    @property
    def deviation(self) -> float | None:
        """The sample deviation over seeds; None for fewer than two."""
        return stdev(self.values.values()) if len(self.values) > 1 else None


@dataclass(frozen=True)
class Difference:
    """A method less what it is compared with, over the seeds that both have.

    ``interval`` holds the mean with 95% confidence and ``p`` is of the paired t-test; None below two seeds and where
    all seeds differ by the same.
    """

    mean: float
    seeds: int
    interval: tuple[float, float] | None = None
    p: float | None = None


@dataclass(frozen=True)
class Table:
    """Entries by row (preset, scheme) and column (method).

    Each row is compared with the column ``base`` of the preset ``against``, or of its own. ``sizes`` are what lines
    say of bits and bytes, by row and column.
    """

    metric: Metric
    columns: tuple[str, ...]
    rows: dict[tuple[str, str], dict[str, Entry]]
    sizes: dict[tuple[str, str, str], Mapping[str, Any]]
    notes: tuple[str, ...]
    against: str | None = None
    base: str = BASELINE_METHOD

    def is_base(self, row: tuple[str, str], column: str) -> bool:
        """Whether an entry is what its row is compared with."""
        return column == self.base and self.against in (None, row[0])

    @property
    def compared_with(self) -> str:
        """What all are compared with, for a heading."""
        return title(self.base) + (f" of preset {self.against}" if self.against else "")


def find_metric(flag: str) -> Metric:
    """The metric of a flag's value; raises :class:`UsageError`."""
    found = next((metric for metric in METRICS if flag in (metric.flag, metric.key)), None)
    if found is None:
        raise UsageError(f"There is no metric {flag!r}; the metrics are {', '.join(m.flag for m in METRICS)}.")
    return found


def usual_metric(lines: Sequence[Line]) -> Metric:
    """The first of the usual ones that some line has: only embedded models have a classifier of their samples."""
    usual = [find_metric(flag) for flag in USUAL]
    return next((m for m in usual if any(m.key in line["results"] for line in lines)), usual[0])


def make_table(lines: Sequence[Line], metric: Metric, against: str | None = None) -> Table:
    """Gather a metric. ``against`` is what all are compared with: PRESET, PRESET:METHOD or :METHOD (of each preset).

    Raises :class:`UsageError` where no line has the metric, where lines are of different models or one preset and
    scheme is measured on several numbers of samples or steps, where one column has different choices, and where the
    method to compare with is missing or was measured on others than a line.
    """
    if all(line["method"] == FULL_PRECISION for line in lines):
        raise UsageError("The results have no finished cell of a quantized model; run the study first.")
    if not any(metric.key in line["results"] for line in lines):
        raise UsageError(f"No line has the metric {metric.flag}; choose another metric.")
    home, base = require_comparable(lines, against)
    cells = dict.fromkeys((line["preset"], line["scheme"]) for line in lines if line["method"] != FULL_PRECISION)
    rows = {row: _entries(lines, row, metric) for row in cells}
    sizes = {(line["preset"], line["scheme"], line["method"]): line["size"] for line in lines if line.get("size")}
    return Table(metric, _columns(rows.values()), rows, sizes, tuple(_notes(lines)), home or None, base)


def _entries(lines: Sequence[Line], row: tuple[str, str], metric: Metric) -> dict[str, Entry]:
    """The entries of a row by method, full precision last."""
    mine = [line for line in lines if (line["preset"], line["scheme"]) == row]
    places = {_measured_on(line) for line in mine}
    full = [line for line in lines if line["method"] == FULL_PRECISION and _measured_on(line) in places]
    found: dict[str, list[Line]] = {}
    for line in (*mine, *full):
        found.setdefault(line["method"], []).append(line)
    return {method: Entry.of(same, metric.key) for method, same in found.items()}


def _columns(rows: Collection[Mapping[str, Entry]]) -> tuple[str, ...]:
    """The methods of all rows, those of the paper first, full precision last if it has the metric."""
    present = dict.fromkeys(method for entries in rows for method in entries)
    others = [method for method in present if method not in (*METHODS, FULL_PRECISION)]
    full = any(entries[FULL_PRECISION].values for entries in rows if FULL_PRECISION in entries)
    return (*(method for method in METHODS if method in present), *others, *([FULL_PRECISION] if full else []))


def _measured_on(line: Mapping[str, Any]) -> tuple[int, int]:
    return line["evaluation"]["samples"], line["evaluation"]["num_inference_steps"]


def _require_one_study(lines: Sequence[Mapping[str, Any]]) -> None:
    """Raise :class:`UsageError` where a table would mix what was measured of different things."""
    for key, what in (("model_sha256", "models"), ("sampling_sha256", "prompts, classes or arguments of a pipeline")):
        if len({line[key] for line in lines if key in line}) > 1:
            raise UsageError(f"The lines are of different {what}; keep those of one study in a file.")
    places, choices = dict[str, set[tuple[int, int]]](), dict[str, list[Any]]()
    for line in lines:
        if line["method"] != FULL_PRECISION:
            row = f"{line['preset']} {line['scheme']}"
            places.setdefault(row, set()).add(_measured_on(line))
            made = {key: value for key, value in line.get("choices", {}).items() if key != "seed"}
            choices.setdefault(f"{row} {title(line['method'])}", []).append(made)
    for row, found in places.items():
        if len(found) > 1:
            raise UsageError(
                f"{row} is measured on several numbers of (samples, steps): {sorted(found)}; "
                "keep one of them in a file."
            )
    for column, of_seeds in choices.items():
        if any(other != of_seeds[0] for other in of_seeds):
            raise UsageError(f"{column} was calibrated with different choices; keep the lines of one study in a file.")


def require_comparable(lines: Sequence[Mapping[str, Any]], against: str | None) -> tuple[str, str]:
    """The preset ("": each row's own) and the column that ``against`` names.

    ``lines`` are cells, measured or not, with all but their results; raises :class:`UsageError` as :func:`make_table`.
    """
    _require_one_study(lines)
    home, _, method = (against or "").partition(":")
    base = label(method) if method else BASELINE_METHOD
    if not against:
        return home, base

    found = [line for line in lines if line["method"] == base and home in ("", line["preset"])]
    where = f"{title(base)} of the preset {home}" if home else title(base)
    if not found:
        raise UsageError(
            f"The study has no {where}; --against takes PRESET, PRESET:METHOD or :METHOD of cells that it has."
        )
    if home and {_measured_on(line) for line in lines} != {_measured_on(line) for line in found}:
        raise UsageError(
            f"Not all cells are measured on the samples and steps of {where}; "
            "--against :METHOD compares within each preset."
        )
    return home, base


def differences(table: Table) -> dict[tuple[tuple[str, str], str], Difference]:
    """Each column against the base, in its row or in that of the preset to compare with, where both have a seed.

    The p values are corrected by Holm's step-down method over all of them (Scand. J. Statist. 6, 1979).
    """
    found = {
        (row, column): change
        for row in table.rows
        for column in table.columns
        if column != FULL_PRECISION
        and not table.is_base(row, column)
        and (change := _difference(table, row, column)) is not None
    }
    least = 0.0
    tested = sorted((change.p, key) for key, change in found.items() if change.p is not None)
    for place, (p, key) in enumerate(tested):
        least = max(least, min(1.0, p * (len(tested) - place)))
        found[key] = replace(found[key], p=least)
    return found


def _difference(table: Table, row: tuple[str, str], column: str) -> Difference | None:
    if column not in table.rows[row]:
        return None
    base_row = table.rows.get((table.against or row[0], row[1]), {})
    base, mine = (e.get(name, Entry({})).values for e, name in ((base_row, table.base), (table.rows[row], column)))
    seeds = sorted(base.keys() & mine.keys())
    if not seeds:
        return None
    pairs = [(mine[seed], base[seed]) for seed in seeds]
    changes = [a - b for a, b in pairs]
    if len(set(changes)) == 1:  # equal differences have no deviation to test against
        return Difference(changes[0], len(seeds))
    from scipy.stats import ttest_rel  # takes a second

    test = ttest_rel(*zip(*pairs, strict=True))
    low, high = test.confidence_interval(0.95)
    return Difference(mean(changes), len(seeds), (float(low), float(high)), float(test.pvalue))


def markdown(table: Table) -> str:
    """Values with their deviation over seeds, then the differences to the base."""
    metric, most = table.metric, _most(table)
    lines = [f"**{metric.title}** ({_better(metric)} is better), mean ± standard deviation over seeds", ""]
    lines += _head(table.columns)
    for row, entries in table.rows.items():
        cells = [_text(metric, entries.get(column), most) for column in table.columns]
        lines.append(f"| {' | '.join([*map(_cell, row), *cells])} |")
    others = [c for c in table.columns if c != FULL_PRECISION and not all(table.is_base(row, c) for row in table.rows)]
    if others and any(table.base in entries for entries in table.rows.values()):
        lines += ["", f"Difference to {_cell(table.compared_with)} on the same seeds ({TEST})", "", *_head(others)]
        changes = differences(table)
        for row in table.rows:
            cells = [_change(metric, changes.get((row, column)), most) for column in others]
            lines.append(f"| {' | '.join([*map(_cell, row), *cells])} |")
    return "\n".join([*lines, "", *table.notes]) + "\n"


def _head(columns: Sequence[str]) -> list[str]:
    titles = " | ".join(_cell(title(column)) for column in columns)
    return [f"| preset | scheme | {titles} |", "|---|---|" + "---:|" * len(columns)]


def _cell(name: str) -> str:
    """A name as Markdown has it in a table."""
    return name.replace("|", r"\|")


def listing(tables: Sequence[Table]) -> str:
    """A line per method: what it costs, and two columns per table: the metric, and its difference to the base."""
    first = max(tables, key=lambda table: len(table.columns))  # with full precision, if one has it
    metrics = [f"{t.metric.title}, {_better(t.metric)} is better | difference" for t in tables]
    costs = [SIZE] if first.sizes else []
    lines = ["| preset | scheme | method | " + " | ".join([*costs, *metrics]) + " |"]
    lines += ["|---|---|---|" + "---:|" * (3 * len(costs) + 2 * len(tables))]
    changes = [differences(table) for table in tables]
    for row, entries in first.rows.items():
        for column in (c for c in first.columns if c in entries):
            cells = [_size(first.sizes.get((*row, column)))] if first.sizes else []
            for table, found in zip(tables, changes, strict=True):
                cells += [_text(table.metric, table.rows[row].get(column), _most(table))]
                cells += [_change(table.metric, found.get((row, column)), _most(table))]
            lines.append(f"| {' | '.join([*map(_cell, (*row, title(column))), *cells])} |")
    how = (
        f"Mean ± standard deviation over seeds; difference to {_cell(first.compared_with)} on the same seeds ({TEST})."
    )
    return "\n".join([*lines, "", how, *first.notes]) + "\n"


def to_csv(table: Table) -> str:
    """One line per row of the table, seven columns per method."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    parts = ("mean", "deviation", "seeds", f"minus {table.compared_with}", "low", "high", "p")
    writer.writerow(["preset", "scheme", "metric", *(f"{title(c)} {part}" for c in table.columns for part in parts)])
    changes = differences(table)
    for row, entries in table.rows.items():
        cells: list[object] = [*row, table.metric.key]
        for column in table.columns:
            entry, change = entries.get(column, Entry({})), changes.get((row, column))
            against = (change.mean, *(change.interval or (None, None)), change.p) if change else (None,) * 4
            cells += [entry.mean, entry.deviation, len(entry.values), *against]
        writer.writerow(["" if cell is None else cell for cell in cells])
    return buffer.getvalue()


def _better(metric: Metric) -> str:
    return "higher" if metric.higher_is_better else "lower"


def _most(table: Table) -> int:
    """The largest number of seeds of an entry."""
    return max((len(e.values) for entries in table.rows.values() for e in entries.values()), default=0)


def title(method: str) -> str:
    """The heading of a method's column."""
    name, colon, change = method.partition(":")
    return f"{TITLES.get(name, name)}{colon}{change}"


def _text(metric: Metric, entry: Entry | None, most: int) -> str:
    if entry is None or not (entry.values or entry.failed):
        return ABSENT
    if entry.mean is None:
        return "fails"
    text = metric.text(entry.mean)
    if entry.deviation is not None:
        text += f" ± {metric.text(entry.deviation)}"
    if entry.failed:
        text += f" ({entry.failed} failed)"
    elif len(entry.values) < most:
        text += f" (n = {len(entry.values)})"
    return text


def _change(metric: Metric, change: Difference | None, most: int) -> str:
    if change is None:
        return ABSENT
    text = f"{change.mean:+.{metric.digits}f}"
    seeds = f" (n = {change.seeds})" if change.seeds < most else ""
    if change.p is None or change.interval is None:
        return text + seeds
    better = (change.mean > 0) == metric.higher_is_better
    text = f"**{text}**" if better and change.p < SIGNIFICANT else text
    low, high = change.interval
    return f"{text} [{low:+.{metric.digits}f}, {high:+.{metric.digits}f}] ({change.p:.2g}){seeds}"


def _size(size: Mapping[str, Any] | None) -> str:
    if size is None:
        return " | ".join((ABSENT,) * 3)
    bits = size["mean_bits"]
    return f"{bits['weights']:.2f} | {bits['activations']:.2f} | {size['bytes'] / 1e6:.2f}"


def _notes(lines: Sequence[Line]) -> list[str]:
    seen = dict.fromkeys(
        f"{line['evaluation']['samples']} samples, {line['evaluation']['num_inference_steps']} steps" for line in lines
    )
    seeds = ", ".join(str(seed) for seed in sorted({line["seed"] for line in lines}))
    own = all(line["evaluation"]["seed"] == line["seed"] for line in lines)
    noise = "its own calibration set and noise" if own else "its own calibration set; all are measured from one noise"
    return [f"Each cell: {'; '.join(seen)}. Seeds: {seeds}. Each seed has {noise}."]
