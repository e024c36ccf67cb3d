"""``torchrun -m ptq_tdq calibrate``: what several processes do as a user starts them (the rest is in tests/recon)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import launched

from ptq_tdq.artifacts import read_artifact
from ptq_tdq.cli.main import COMMANDS, SHARED

LAUNCH = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "ptq_tdq")
forked = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked")


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
    assert len(list(cache.glob("calls-*"))) == 1


@pytest.fixture
def machines(tmp_path: Path) -> list[Path]:
    """Where two machines begin that see nothing of each other's disk."""
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    return folders


@forked
def test_the_first_of_several_machines_alone_keeps_something(
    conditional: Path, small: tuple[str, ...], machines: list[Path]
) -> None:
    """Streams lie on each one's own disk while the command runs."""
    quick = ("--method", "static", "--set", "rounding=nearest", "--set", "activation_iterations=0")
    request = ("calibrate", "--model", conditional, "--output-dir", "out", *small, *quick, "--cache-budget", "0")
    with launched(2, *request, machines=machines) as commands:
        for command in commands:
            assert command.end()[0] == 0, command.end()
    assert [[path.name for path in folder.iterdir()] for folder in machines] == [["out"], []]


@forked
@pytest.mark.parametrize("name", ["calibrate", "finetune"])
def test_what_one_machine_lacks_ends_the_run_and_is_told_once(
    name: str, conditional: Path, calibrated: Callable[[Path], Path], small: tuple[str, ...], machines: list[Path]
) -> None:
    if name == "finetune":
        (machines[0] / "artifact").symlink_to(calibrated(conditional))
        request: tuple[object, ...] = ("finetune", "artifact", "--output-dir", "out")
    else:
        (machines[1] / "out").touch()
        request = ("calibrate", "--output-dir", "out", *small)
    with launched(2, *request, "--model", conditional, machines=machines) as commands:
        (code, _, err), (other, _, nothing) = [command.end() for command in commands]
    assert (code, other, nothing) == (1, 1, "") and err.count("\n") == 1
    assert ("artifact" if name == "finetune" else "out' is a file, not a folder") in err


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Be the process of a rank, and of a rank on its machine, in a launch of two."""

    def be(rank: int, place: int) -> None:
        for key, value in {"WORLD_SIZE": 2, "RANK": rank, "LOCAL_RANK": place}.items():
            monkeypatch.setenv(key, str(value))

    return be


def test_the_first_process_of_each_machine_tells_what_is_wrong_with_a_request(
    cli: Any, launch: Callable[[int, int], None]
) -> None:
    told = []
    for rank, place in ((0, 0), (1, 1), (1, 0)):
        launch(rank, place)
        for request in (("--scheme", "W4", "--output-dir", "out"), ("--scheme",)):
            result = cli("calibrate", *request)
            assert result.code == 2
            told.append(result.err.startswith("Error: "))
    assert told == [True, True, False, False, True, True]


@pytest.mark.parametrize("name", ["calibrate", "finetune"])
def test_choices_are_shown_once(name: str, cli: Any, launch: Callable[[int, int], None]) -> None:
    request = (name, *(("artifact", "--output-dir", "out") if name == "finetune" else ()), "--show-config")
    launch(0, 0)
    assert "seed" in json.loads(cli(*request).out)
    launch(1, 1)
    assert cli(*request).out == ""


@pytest.mark.parametrize("name", sorted(COMMANDS.keys() - SHARED))
def test_a_command_that_processes_cannot_share_says_so(name: str, cli: Any, launch: Callable[[int, int], None]) -> None:
    launch(0, 0)
    result = cli(name)
    assert result.code == 2 and result.err.count("\n") == 1
    assert f"{name} runs in one process; start it without torchrun" in result.err
    assert ("--workers and --shard" in result.err) == (name == "benchmark")
    launch(1, 1)
    assert (cli(name).code, cli(name).err) == (2, "")


@pytest.mark.parametrize("surroundings", [{"WORLD_SIZE": "8"}, {"RANK": "0", "WORLD_SIZE": "many"}])
def test_names_that_no_launcher_has_set_stop_nothing(
    surroundings: dict[str, str], cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in surroundings.items():
        monkeypatch.setenv(name, value)
    assert cli("inspect", "nowhere").err.startswith("Error: 'nowhere' is not a directory")
