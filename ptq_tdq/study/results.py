"""The results file: one JSON line per finished cell, safe against a run that is killed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ptq_tdq.choices import ungrouped
from ptq_tdq.errors import OutputError, UsageError
from ptq_tdq.evaluate.names import METRICS
from ptq_tdq.files import read_file, reason
from ptq_tdq.study.matrix import FULL_PRECISION, Cell

Line = dict[str, Any]
MOST_BYTES = 1 << 28
_NAMES = "preset", "scheme", "method"  # which tables show
_BEGIN = b'{"'  # of each line
LARGEST = 1e30  # that a metric or a time may be: tables square them


def read_lines(path: Path) -> list[Line]:
    """The finished cells; none where there is no file. A last line that was cut off by a kill does not count.

    Raises :class:`UsageError` for a file that holds anything else.
    """
    try:
        data = read_file(path, MOST_BYTES) if path.exists() else b""
        text = data[: _whole(data)].decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise UsageError(f"The results file '{path}' cannot be read ({reason(error)}); choose another one.") from None
    lines, known = list[Line](), dict[tuple[Any, ...], Line]()
    for number, text_line in enumerate(text.splitlines(), 1):
        try:
            line = _checked(json.loads(text_line)) if text_line.strip() else None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise UsageError(
                f"Line {number} of '{path}' is no result of a study; take it out, or choose another file."
            ) from None
        if line is None:
            continue
        place = (*_key(line), line["evaluation"]["samples"], line["evaluation"]["num_inference_steps"])
        if known.setdefault(place, line)["results"] != line["results"]:
            raise UsageError(
                f"Line {number} of '{path}' has other results than an earlier line of the same cell; keep one of them."
            )
        lines.append(line)
    return lines


def _whole(data: bytes) -> int:
    """How many bytes are whole lines, or no line of a study at all.

    The last one is whole without its end, too, where it is JSON; it was cut off where it only begins as lines do.
    """
    end = data.rfind(b"\n") + 1
    last = data[end:]
    try:
        json.loads(last)
    except (ValueError, RecursionError):
        return end if _BEGIN.startswith(last[: len(_BEGIN)]) else len(data)
    return len(data)


def append_line(path: Path, line: Line) -> None:
    """Add a line and wait until the disk has it; a cut-off line at the end is removed first."""
    data = (json.dumps(line, sort_keys=True, allow_nan=False) + "\n").encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as file:
            file.seek(0)
            known = file.read()
            kept = _whole(known)
            file.truncate(kept)
            file.write(data if known[:kept].endswith(b"\n") or not kept else b"\n" + data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OutputError(
            f"The results file '{path}' cannot be written ({error.strerror or error}); "
            "free some space or choose another one."
        ) from None


def unfinished(
    cells: Sequence[Cell], lines: Sequence[Line], model_sha256: str, sampling_sha256: str = ""
) -> list[Cell]:
    """The cells that no line has. ``sampling_sha256`` names what is sampled, where lines say that.

    Raises :class:`UsageError` where a line has a cell's place but other choices: a file holds one study.
    """
    known = {_key(line): line for line in lines}
    left = []
    for cell in cells:
        line = known.get(_cell_key(cell))
        if line is None:
            left.append(cell)
        elif (
            line["model_sha256"] != model_sha256
            or line.get("sampling_sha256", sampling_sha256) != sampling_sha256
            or not cell.same(line)
        ):
            place = " ".join(str(part) for part in cell.key if part != "")
            raise UsageError(
                f"The results file holds the cell '{place}' with {_difference(cell, line)}; choose another file for "
                "another study."
            )
    return left


def _key(line: Line) -> tuple[Any, ...]:
    return _place((line["preset"], line["scheme"], line["method"], line["seed"]), line["evaluation"])


def _cell_key(cell: Cell) -> tuple[Any, ...]:
    return _place(cell.key, cell.evaluation)


def _place(key: tuple[str, str, str, int], evaluation: Mapping[str, int]) -> tuple[Any, ...]:
    """Presets may differ in their steps, so full precision has a cell for each number of them."""
    return (*key, evaluation["num_inference_steps"] if key[2] == FULL_PRECISION else None)


def _difference(cell: Cell, line: Line) -> str:
    wanted, stored = dict[str, Any](cell.evaluation), dict(line["evaluation"])
    if cell.method != FULL_PRECISION:
        wanted, stored = wanted | ungrouped(cell.choices), stored | ungrouped(line["choices"])
    for key in [*wanted, *stored]:
        if wanted.get(key) != stored.get(key):
            return f"{key} {stored.get(key)} where this study has {wanted.get(key)}"
    return "another model, or other prompts, classes or arguments of its pipeline"


def _checked(line: Line) -> Line:
    kinds = {**dict.fromkeys((*_NAMES, "model_sha256"), str), "seed": int, "results": dict}
    kinds |= {} if line["method"] == FULL_PRECISION else {"choices": dict}
    counts = {key: line["evaluation"][key] for key in ("samples", "num_inference_steps", "seed")}
    numbers = [value for value in line["results"].values() if not isinstance(value, dict | None)]
    numbers += [value for metric in METRICS if (value := line["results"].get(metric.key)) is not None]
    numbers += (line.get("seconds") or {}).values()
    if size := line.get("size"):
        numbers += [size["bytes"], size["mean_bits"]["weights"], size["mean_bits"]["activations"]]
    if not (
        all(isinstance(line[key], kind) for key, kind in kinds.items())
        and all(line[key].isprintable() for key in _NAMES)
        and all(type(count) is int for count in counts.values())
        and all(type(number) in (int, float) and abs(number) < LARGEST for number in numbers)  # nor NaN
    ):
        raise TypeError
    return line
