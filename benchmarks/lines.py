"""Lines of result files: what was measured and, beside it, the machine, the versions, the commit and the command."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ptq_tdq.study.facts import facts as of_machine

Line = dict[str, Any]


def facts() -> Line:
    """Facts of a run of this script as plain JSON data; paths are not among them."""
    return of_machine(shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]))


def read(path: Path) -> list[Line]:
    """The lines of a file; none where there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(path: Path, line: Line) -> Line:
    """Add a line with its facts to a file; returns it."""
    line = {**line, "facts": facts() | line.get("facts", {})}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")
    return line


def parse_choices(settings: Iterable[str]) -> dict[str, str]:
    """Choices of calibration, given as name=value."""
    return dict(setting.split("=", 1) for setting in settings)
