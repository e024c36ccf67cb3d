"""One calibration by one process and by two, as a user starts it, beside what ``--dry-run`` says of each.

The whole command, sampling and comparison included, with an empty cache each time; the machine should have nothing else
to do. One JSON line per way: seconds, the largest process's memory, the same as foretold before, and what the artifact
keeps of the prediction. ``--render`` prints the lines as a table.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
from lines import append, read

RESULTS = Path(__file__).parent / "results" / "processes.jsonl"
PYTHON = (sys.executable, "-P")
SHARED = (*PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
WAYS = {  # name -> how Python starts, threads of each process
    "one process, one thread": (PYTHON, 1),
    "one process, two threads": (PYTHON, 2),
    "two processes, one thread each": (SHARED, 1),
}


@click.command()
@click.option("--model", default="reference", show_default=True)
@click.option("--set", "settings", multiple=True, help="A choice of calibration, name=value.")
@click.option("--way", type=click.Choice(list(WAYS)), help="[default: one after the other]")
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS)
@click.option("--render", is_flag=True, help="Only print the table.")
def main(model: str, settings: tuple[str, ...], way: str | None, results: Path, render: bool) -> None:
    if way:
        flags = ["--model", model, *(word for setting in settings for word in ("--set", setting))]
        append(results, {"way": way, "model": model, "set": list(settings), **measure(way, flags)})
    for each in [] if render or way else WAYS:  # in a process of its own, which knows what its children take
        subprocess.run([sys.executable, *sys.argv, "--way", each], check=True, stdout=subprocess.DEVNULL)
    print(table(read(results)))


def measure(way: str, flags: list[str]) -> dict[str, Any]:
    start, threads = WAYS[way]
    with tempfile.TemporaryDirectory() as folder:
        command = [*start, "-m", "ptq_tdq", "calibrate", *flags, "--threads", str(threads), "--json", "--quiet"]
        command += ["--output-dir", f"{folder}/out"]
        environment = {**os.environ, "PTQ_TDQ_CACHE": f"{folder}/cache", "OMP_NUM_THREADS": str(threads)}
        foretold = json.loads(_output([*command, "--dry-run"], environment))
        began = time.perf_counter()
        found = json.loads(_output(command, environment))
        seconds = time.perf_counter() - began
    largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024  # of its children and theirs
    kept = {name: found[name]["mean_noise_sqnr_db"] for name in ("learned", "static") if name in found}
    return {"seconds": seconds, "bytes": largest, "foretold": foretold, "prediction_sqnr_db": kept}


def _output(command: list[str], environment: dict[str, str]) -> bytes:
    return subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown."""
    rows = ["| model | way | minutes | foretold | largest process, GiB | prediction, dB |", "|---|---|---|---|---|---|"]
    for line in lines:
        told = line["foretold"]
        minutes = sum(told[name] for name in ("recording_seconds", "seconds", "measuring_seconds")) / 60
        numbers = line["seconds"] / 60, minutes, line["bytes"] / 2**30, line["prediction_sqnr_db"]["learned"]
        rows.append(f"| {line['model']} | {line['way']} | " + " | ".join(f"{number:.1f}" for number in numbers) + " |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
