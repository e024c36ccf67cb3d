"""``torchrun -m ptq_tdq calibrate``: what several processes do as a user starts them (the rest is in tests/recon)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ptq_tdq.artifacts import read_artifact

LAUNCH = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "ptq_tdq")


def test_two_processes_write_one_artifact_and_one_speaks(
    conditional: Path, small: tuple[str, ...], tmp_path: Path
) -> None:
    """One samples the calls, keeps the run's files, and tells the result."""
    out, cache = tmp_path / "out", tmp_path / "cache"
    quick = ("--method", "static", "--set", "rounding=nearest", "--set", "activation_iterations=0")
    request = ("calibrate", "--model", conditional, "--output-dir", out, *small, *quick, "--json", "-v")
    done = subprocess.run(
        [*LAUNCH, *map(str, request)], env={**os.environ, "PTQ_TDQ_CACHE": str(cache)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["reconstruction"] == read_artifact(out).metrics["reconstruction"]
    assert done.stderr.count("Loading the model") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "out"]
    assert len(list(cache.iterdir())) == 1


def test_the_first_of_several_processes_tells_what_is_wrong(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    told = []
    for rank in ("0", "1"):
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", rank)
        result = cli("calibrate", "--scheme", "W4", "--output-dir", "out")
        assert result.code == 2
        told.append(result.err)
    assert told[0].startswith("Error: ") and told[1] == ""
