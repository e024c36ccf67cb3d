"""The table of a study, from its lines alone, in the layout of supp Table 4: a row per scheme, a column per method."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from scipy.stats import ttest_rel

from ptq_tdq.errors import UsageError
from ptq_tdq.evaluate.names import METRICS, Metric
from ptq_tdq.study.matrix import BASELINE_METHOD, FULL_PRECISION, METHODS
from ptq_tdq.study.results import Line

TITLES = {"tdq": "TDQ", "tdq-thin": "TDQ_thin", BASELINE_METHOD: "S_1", FULL_PRECISION: "FP"}
SIGNIFICANT = 0.05
ABSENT = "-"


@dataclass(frozen=True)
class Entry:
    """A metric's values by seed, in one cell of the table; ``failed`` counts the seeds whose calibration diverged."""

    values: dict[int, float]
    failed: int = 0

    @property
    def mean(self) -> float | None:
        return mean(self.values.values()) if self.values else None

    @property
    def deviation(self) -> float | None:
        """The sample deviation over seeds; None for fewer than two."""
        return stdev(self.values.values()) if len(self.values) > 1 else None


@dataclass(frozen=True)
class Difference:
    """A method less S_1, over the seeds that both have, and the p value of a paired t-test (None below two seeds)."""

    mean: float
    seeds: int
    p: float | None


@dataclass(frozen=True)
class Table:
    """Entries by row (preset, scheme) and column (method); ``against`` is the preset of the S_1 to compare with.

    Without one each row is compared with its own.
    """

    metric: Metric
    columns: tuple[str, ...]
    rows: dict[tuple[str, str], dict[str, Entry]]
    notes: tuple[str, ...]
    against: str | None = None

    def is_baseline(self, row: tuple[str, str], column: str) -> bool:
        """Whether an entry is what its row is compared with."""
        return column == BASELINE_METHOD and self.against in (None, row[0])


def find_metric(flag: str) -> Metric:
    """The metric of a flag's value; raises :class:`UsageError`."""
    found = next((metric for metric in METRICS if flag in (metric.flag, metric.key)), None)
    if found is None:
        raise UsageError(f"There is no metric {flag!r}; the metrics are {', '.join(m.flag for m in METRICS)}.")
    return found


def make_table(lines: Sequence[Line], metric: Metric, against: str | None = None) -> Table:
    """Gather a metric.

    Raises :class:`UsageError` where no line has it, and where S_1 of the preset ``against`` is missing or was measured
    on other samples or steps than a line.
    """
    if not any(metric.key in line["results"] for line in lines):
        raise UsageError(f"No line has the metric {metric.flag}; run the study first or choose another metric.")
    if against is not None:
        _require_comparable(lines, against)
    rows: dict[tuple[str, str], dict[str, Entry]] = {}
    for line in lines:
        if line["method"] != FULL_PRECISION:
            rows.setdefault((line["preset"], line["scheme"]), {})
    for row, entries in rows.items():
        mine = [line for line in lines if (line["preset"], line["scheme"]) == row]
        steps = {line["evaluation"]["num_inference_steps"] for line in mine}
        full = [
            line
            for line in lines
            if line["method"] == FULL_PRECISION and line["evaluation"]["num_inference_steps"] in steps
        ]
        for line in (*mine, *full):
            entry = entries.setdefault(line["method"], Entry({}))
            value = line["results"].get(metric.key)
            if value is not None:
                entry.values[line["seed"]] = value
            elif "failed" in line:
                entries[line["method"]] = Entry(entry.values, entry.failed + 1)
    present = [method for entries in rows.values() for method in entries]
    others = [m for m in dict.fromkeys(present) if m not in (*METHODS, FULL_PRECISION)]
    full_too = [FULL_PRECISION] if any(e[FULL_PRECISION].values for e in rows.values() if FULL_PRECISION in e) else []
    columns = (*(m for m in METHODS if m in present), *others, *full_too)
    return Table(metric, columns, rows, tuple(_notes(lines)), against)


def _require_comparable(lines: Sequence[Line], against: str) -> None:
    def measured_on(line: Line) -> tuple[int, int]:
        return line["evaluation"]["samples"], line["evaluation"]["num_inference_steps"]

    base = {measured_on(line) for line in lines if (line["preset"], line["method"]) == (against, BASELINE_METHOD)}
    if not base:
        raise UsageError(f"No line is S_1 of the preset {against}; compare with a preset that has it.")
    if {measured_on(line) for line in lines} != base:
        raise UsageError(
            f"Not all lines were measured on the samples and steps of preset {against}; leave --against out."
        )


def difference(table: Table, row: tuple[str, str], column: str) -> Difference | None:
    """A column against S_1, in its row or in that of the preset to compare with; None without a common seed."""
    base_row = table.rows.get((table.against or row[0], row[1]), {})
    base, mine = (e.get(name, Entry({})).values for e, name in ((base_row, BASELINE_METHOD), (table.rows[row], column)))
    seeds = sorted(base.keys() & mine.keys())
    if not seeds:
        return None
    pairs = [(mine[seed], base[seed]) for seed in seeds]
    changes = [a - b for a, b in pairs]
    p = None
    if len(set(changes)) > 1:  # equal differences have no deviation to test against
        p = float(ttest_rel(*zip(*pairs, strict=True)).pvalue)
    return Difference(mean(changes), len(seeds), p)


def markdown(table: Table) -> str:
    """Values with their deviation over seeds, then the differences to S_1."""
    metric, titles = table.metric, [title(column) for column in table.columns]
    most = max((len(e.values) for entries in table.rows.values() for e in entries.values()), default=0)
    better = "higher" if metric.higher_is_better else "lower"
    lines = [f"**{metric.title}** ({better} is better), mean ± standard deviation over seeds", ""]
    lines += ["| preset | scheme | " + " | ".join(titles) + " |", "|---|---|" + "---:|" * len(titles)]
    for (preset, scheme), entries in table.rows.items():
        cells = [_text(metric, entries.get(column), most) for column in table.columns]
        lines.append(f"| {preset} | {scheme} | " + " | ".join(cells) + " |")
    others = [
        c for c in table.columns if c != FULL_PRECISION and not all(table.is_baseline(row, c) for row in table.rows)
    ]
    if others and any(BASELINE_METHOD in entries for entries in table.rows.values()):
        test = "p of a paired t-test; **bold**: better with p < 0.05"
        lines += ["", f"Difference to S_1{_of(table)} on the same seeds ({test})", ""]
        lines += ["| preset | scheme | " + " | ".join(map(title, others)) + " |", "|---|---|" + "---:|" * len(others)]
        for row in table.rows:
            changes = [None if table.is_baseline(row, c) else difference(table, row, c) for c in others]
            cells = [_change(metric, change) for change in changes]
            lines.append(f"| {' | '.join(row)} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *table.notes]) + "\n"


def to_csv(table: Table) -> str:
    """One line per row of the table, five columns per method."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    parts = ("mean", "deviation", "seeds", f"minus S_1{_of(table)}", "p")
    writer.writerow(["preset", "scheme", "metric", *(f"{title(c)} {part}" for c in table.columns for part in parts)])
    for row, entries in table.rows.items():
        cells: list[object] = [*row, table.metric.key]
        for column in table.columns:
            entry, change = entries.get(column, Entry({})), difference(table, row, column)
            against = (change.mean, change.p) if change and not table.is_baseline(row, column) else (None, None)
            cells += [entry.mean, entry.deviation, len(entry.values), *against]
        writer.writerow(["" if cell is None else cell for cell in cells])
    return buffer.getvalue()


def _of(table: Table) -> str:
    return f" of preset {table.against}" if table.against else ""


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


def _change(metric: Metric, change: Difference | None) -> str:
    if change is None:
        return ABSENT
    text = f"{change.mean:+.{metric.digits}f}"
    if change.p is None:
        return text
    better = (change.mean > 0) == metric.higher_is_better
    text = f"**{text}**" if better and change.p < SIGNIFICANT else text
    return f"{text} ({change.p:.2g})"


def _notes(lines: Sequence[Line]) -> list[str]:
    seen = dict.fromkeys(
        f"{line['evaluation']['samples']} samples, {line['evaluation']['num_inference_steps']} steps" for line in lines
    )
    seeds = ", ".join(str(seed) for seed in sorted({line["seed"] for line in lines}))
    own = all(line["evaluation"]["seed"] == line["seed"] for line in lines)
    noise = "its own calibration set and noise" if own else "its own calibration set; all are measured from one noise"
    return [f"Each cell: {'; '.join(seen)}. Seeds: {seeds}. Each seed has {noise}."]
