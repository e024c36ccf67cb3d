"""``calibrate --dry-run`` and ``--cache-budget``: what a run will take, and that nothing of it changes the result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from commands import launched

from ptq_tdq import Calls
from ptq_tdq.artifacts import CONFIG_FILE

MANY = ("--samples-per-step", "1000000")


def test_the_counts_are_those_of_the_run(
    cli: Any, small: Any, pipeline: Path, calibrated: Any, shared_cache: Path, tmp_path: Path
) -> None:
    run = ("calibrate", "--model", pipeline, "--output-dir", tmp_path / "out", *small)
    found = json.loads((result := cli(*run, "--dry-run", "--json")).out)
    assert (result.code, result.err) == (0, "") and list(tmp_path.iterdir()) == []
    artifact = calibrated(pipeline)
    config, metrics = (json.loads((artifact / name).read_text()) for name in (CONFIG_FILE, "metrics.json"))
    recorded = [Calls.load(path) for path in shared_cache.glob("calls-*.safetensors")]
    (calls,) = [c for c in recorded if c.sha256 == config["calibration_set"]["sha256"]]
    assert found["rows"] == len(calls)
    assert found["recorded_bytes"] == sum(leaf.nbytes for group in calls.groups for leaf in group.rows)  # type: ignore[union-attr]
    assert found["units"] == len(metrics["reconstruction"]["weights"])
    assert found["layers"] == sum(layer["kind"] != "product" for layer in config["layers"])
    files = sum(path.stat().st_size for path in artifact.iterdir())
    assert files < found["disk_bytes"] and not found["streams_on_disk"] and found["seconds"] > 0
    unmeasured = json.loads(cli(*run, "--dry-run", "--json", "--evaluation-samples", "0").out)
    assert unmeasured["measuring_seconds"] == 0 < found["measuring_seconds"]
    silent = cli(*run, "--dry-run", "--quiet")
    assert (silent.code, silent.out, silent.err) == (0, "", "")
    shown = cli(*run, "--dry-run")
    assert shown.code == 0 and f"{found['rows']} rows" in shown.out and "at the peak" in shown.out


def test_two_processes_are_foretold_together(cli: Any, small: Any, pipeline: Path, tmp_path: Path) -> None:
    """The streams of both are those of one; each holds the model and the recorded calls."""
    run = ("calibrate", "--model", pipeline, "--output-dir", tmp_path / "out", *small, "--dry-run", "--json")
    alone = json.loads(cli(*run).out)
    with launched(2, *run) as (first, second):
        (code, out, err), other = first.end(), second.end()
    assert (code, err) == (0, "") and other == (0, "", "") and list(tmp_path.iterdir()) == []
    both = json.loads(out)
    assert (alone["processes"], both["processes"]) == (1, 2)
    assert all(both[key] == alone[key] for key in ("units", "layers", "rows", "recorded_bytes", "stream_bytes"))
    assert alone["memory_bytes"] < both["memory_bytes"] < 2.5 * alone["memory_bytes"]


def test_a_budget_changes_no_byte(
    cli: Any, small: Any, pipeline: Path, calibrated: Any, contents: Any, tmp_path: Path
) -> None:
    result = cli(
        *("calibrate", "--model", pipeline, "--output-dir", tmp_path / "out", *small), "--cache-budget", "1KiB"
    )
    assert (result.code, list(tmp_path.iterdir())) == (0, [tmp_path / "out"])
    assert contents(tmp_path / "out") == contents(calibrated(pipeline))


def test_a_run_that_will_not_fit_says_so_at_once(cli: Any, small: Any, pipeline: Path, tmp_path: Path) -> None:
    run = ("calibrate", "--model", pipeline, "--output-dir", tmp_path / "out", *small, *MANY)
    for more in (("--cache-budget", "999999TiB"), ("--dry-run", "--cache-budget", "999999TiB")):
        result = cli(*run, *more)
        assert result.code == 1 and result.err.count("\n") == 1
        assert "GiB of memory, of which" in result.err and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", ["", "2 lightyears", "-1GiB", "GiB", "1e9", "99999999999999999999"])
def test_what_is_no_size_is_one_sentence(size: str, cli: Any, pipeline: Path, tmp_path: Path) -> None:
    result = cli("calibrate", "--model", pipeline, "--output-dir", tmp_path / "out", "--cache-budget", size)
    assert result.code == 2 and f"'{size}' is no size; write a number and a unit" in result.err
