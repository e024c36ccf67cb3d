"""What stands beside every published number: the machine, the versions, the commit and the command."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

from ptq_tdq.study.facts import facts as of_machine


def facts() -> dict[str, Any]:
    """Facts of a run of this script as plain JSON data; paths are not among them."""
    return of_machine(shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]))
