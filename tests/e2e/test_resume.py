"""A run that is killed goes on at the first unfinished block and ends with the same bytes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial as partial_function
from importlib import import_module
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel

from ptq_tdq.cli.unfinished import Unfinished
from ptq_tdq.files import holding


def stop_after(
    units: int, phase: str, arguments: Sequence[object], partial: Path, stop: signal.Signals
) -> tuple[int | None, str]:
    """Start the command, send ``stop`` when ``units`` units of ``phase`` are on disk; return exit code and stderr.

    Not a fork of this process, which holds threads of all that was tested in it: one that is stopped may crash.
    """
    command = [sys.executable, "-m", "ptq_tdq", *map(str, arguments)]
    ordinary = partial_function(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a background job of a shell ignores it
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, preexec_fn=ordinary
    ) as process:
        while process.poll() is None and len(list(partial.glob(f"{phase}-*.safetensors"))) < units:
            sleep(0.002)
        process.send_signal(stop)
        _, err = process.communicate()
    return process.returncode, err


@pytest.fixture(scope="module")
def killed(
    pipeline: Path, small: tuple[str, ...], shared_cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, Path], Path]:
    """The .partial folder of a run killed in a phase, copied to where the test wants its output."""
    made: dict[str, Path] = {}

    def partial_of(phase: str, out: Path) -> Path:
        if phase not in made:
            first = tmp_path_factory.mktemp("killed") / "out"
            made[phase] = first.with_name("out.partial")
            command = ("calibrate", "--model", pipeline, "--output-dir", first, *small)
            code, err = stop_after(2, phase, command, made[phase], signal.SIGKILL)
            assert code == -signal.SIGKILL, err
            assert not first.exists()
        return Path(shutil.copytree(made[phase], out.with_name(f"{out.name}.partial")))

    return partial_of


@pytest.mark.parametrize("phase", ["weights", "activations"])
def test_a_killed_run_ends_with_the_same_bytes(
    phase: str,
    killed: Callable[[str, Path], Path],
    cli: Any,
    small: tuple[str, ...],
    contents: Any,
    calibrated: Any,
    pipeline: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    partial = killed(phase, out)
    kept = sorted(path.name for path in partial.glob("*.safetensors"))
    result = cli("calibrate", "--model", pipeline, "--output-dir", out, *small, "-v")
    assert result.code == 0, result.err
    read = [line for line in result.err.splitlines() if line.endswith("(0.0 s)")]
    assert len(read) >= len(kept)  # finished units are read, not computed again
    assert contents(out) == contents(calibrated(pipeline))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (("--set", "weight_lr=0.5"), "choice weight_lr (0.01, now 0.5)"),
        (("--scheme", "W3A3"), "choice scheme ('W4A8', now 'W3A3')"),
        (("--seed", "5"), "choice seed (0, now 5)"),
        (("--samples-per-step", "5"), "choice samples_per_step (4, now 5)"),
    ],
)
def test_another_choice_is_refused_by_name(
    change: tuple[str, str],
    key: str,
    killed: Callable[[str, Path], Path],
    cli: Any,
    small: tuple[str, ...],
    contents: Any,
    pipeline: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    partial = killed("weights", out)
    before = contents(partial)
    result = cli("calibrate", "--model", pipeline, "--output-dir", out, *small, *change)
    assert result.code == 1 and len(result.err.splitlines()) == 1
    assert f"has another {key}; start with --no-resume" in result.err
    assert not out.exists() and contents(partial) == before


def test_another_model_and_another_calibration_set_are_refused(
    killed: Callable[[str, Path], Path],
    cli: Any,
    small: tuple[str, ...],
    unet: Callable[..., UNet2DModel],
    pipeline: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    killed("weights", out)
    changed = Path(shutil.copytree(pipeline, tmp_path / "model"))
    model = unet()
    with torch.no_grad():
        model.conv_in.weight[0, 0, 0, 0] += 1
    model.save_pretrained(changed / "unet")
    result = cli("calibrate", "--model", changed, "--output-dir", out, *small)
    assert result.code == 1 and "has another model ('" in result.err

    scheduler = changed / "scheduler" / "scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace('"beta_end": 0.02', '"beta_end": 0.03'))
    unet().save_pretrained(changed / "unet")
    result = cli("calibrate", "--model", changed, "--output-dir", out, *small)
    assert result.code == 1 and "has another calibration_set ('" in result.err


def test_no_resume_starts_afresh(
    killed: Callable[[str, Path], Path],
    cli: Any,
    small: tuple[str, ...],
    contents: Any,
    calibrated: Any,
    pipeline: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    partial = killed("weights", out)
    for path in partial.iterdir():
        if path.is_file():  # the kill may have left a folder half-written
            path.write_bytes(b"damaged")
    (partial / ".ptq-tdq-of-a-killed-writer.tmp").mkdir()
    (partial / ".ptq-tdq-of-a-killed-writer.tmp" / "new").write_bytes(b"half")
    result = cli("calibrate", "--model", pipeline, "--output-dir", out, *small, "--no-resume")
    assert (result.code, result.err) == (0, "")
    assert contents(out) == contents(calibrated(pipeline))
    assert not partial.exists()


def test_damaged_checkpoints_are_named_and_done_again(
    killed: Callable[[str, Path], Path],
    cli: Any,
    small: tuple[str, ...],
    contents: Any,
    calibrated: Any,
    pipeline: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    partial = killed("activations", out)
    (partial / "run.json").write_text("[]")
    weights, activations = partial / "weights-0001.safetensors", partial / "activations-0000.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    activations.write_bytes(activations.read_bytes()[:100])
    result = cli("calibrate", "--model", pipeline, "--output-dir", out, *small)
    assert result.code == 0
    assert [line.partition(" is damaged")[0] for line in result.err.splitlines()] == [
        str(partial / "run.json"),
        f"The checkpoint {weights}",
        f"The checkpoint {activations}",
    ]
    assert contents(out) == contents(calibrated(pipeline))


def test_a_folder_of_the_user_with_the_name_of_an_unfinished_run_is_left_alone(
    cli: Any, small: tuple[str, ...], contents: Any, pipeline: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "out.partial"
    mine.mkdir()
    (mine / "letter.txt").write_text("mine")
    for flags in ((), ("--no-resume",)):
        result = cli("calibrate", "--model", pipeline, "--output-dir", tmp_path / "out", *small, *flags)
        assert result.code == 1 and "holds 'letter.txt', which is no part of one" in result.err
    assert contents(tmp_path) == {"out.partial/letter.txt": b"mine"}


def test_what_others_put_beside_an_unfinished_run_stays_and_does_no_harm(
    cli: Any, small: tuple[str, ...], pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial, finish = tmp_path / "out.partial", Unfinished.finish

    def with_letter(run: Unfinished, *args: Any, **kwargs: Any) -> None:
        (partial / "letter.txt").write_text("theirs")
        finish(run, *args, **kwargs)

    partial.mkdir()
    (partial / ".DS_Store").write_text("theirs")  # of a file manager
    monkeypatch.setattr(Unfinished, "finish", with_letter)
    result = cli("calibrate", "--model", pipeline, "--output-dir", tmp_path / "out", *small, "--json")
    assert (result.code, result.err) == (0, "")
    assert json.loads(result.out)["output_dir"] == str(tmp_path / "out")
    assert sorted(path.name for path in partial.iterdir()) == [".DS_Store", "letter.txt"]


@pytest.mark.parametrize("name", ["run.json", "weights-0000.safetensors", "finetune-0000.safetensors"])
def test_a_pipe_or_a_device_in_the_place_of_a_file_is_one_sentence(
    name: str, cli: Any, small: tuple[str, ...], pipeline: Path, tmp_path: Path
) -> None:
    """Reading either may never end."""
    partial = tmp_path / "out.partial"
    partial.mkdir()
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
        make(partial / name)
        result = cli("calibrate", "--model", pipeline, "--output-dir", tmp_path / "out", *small)
        assert result.code == 1 and f"holds '{name}', which is no part of one" in result.err
        (partial / name).unlink()


def test_two_runs_in_one_folder_are_one_sentence(
    cli: Any, small: tuple[str, ...], pipeline: Path, tmp_path: Path
) -> None:
    (tmp_path / "out.partial").mkdir()
    with holding(tmp_path / "out.partial") as held:
        result = cli("calibrate", "--model", pipeline, "--output-dir", tmp_path / "out", *small)
    assert held and result.code == 1 and result.err.count("\n") == 1
    assert f"Another run works in '{tmp_path / 'out.partial'}'; wait for its end" in result.err
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]


@pytest.mark.parametrize(("stop", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_that_is_stopped_keeps_the_finished_blocks_and_says_so(
    stop: signal.Signals, expected: int, small: tuple[str, ...], pipeline: Path, tmp_path: Path
) -> None:
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    command = ("calibrate", "--model", pipeline, "--output-dir", out, *small)
    code, err = stop_after(1, "weights", command, partial, stop)
    assert (code, err.strip()) == (expected, "Stopped; the same command goes on after the last finished block.")
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    assert (partial / "weights-0000.safetensors").exists()


@pytest.mark.parametrize(("command", "code"), [(("choices",), 0), (("choices", "--no-such-flag"), 2)])
def test_after_a_command_signals_do_what_they_did(command: tuple[str, ...], code: int, cli: Any) -> None:
    numbers = signal.SIGTERM, signal.SIGINT, signal.SIGHUP
    before = [signal.getsignal(number) for number in numbers]
    assert cli(*command).code == code and [signal.getsignal(number) for number in numbers] == before


IN_A_TERMINAL = """
import fcntl, signal, termios
from time import sleep
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which tests that nohup has started ignore
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
import ptq_tdq.cli.inspect as inspect
from ptq_tdq.cli.main import main
inspect.read_artifact = lambda path: (print("ready", flush=True), sleep(60))
main(["inspect", "out"])
"""


def test_a_terminal_that_is_closed_stops_a_command() -> None:
    ours, theirs = os.openpty()
    command = [sys.executable, "-c", IN_A_TERMINAL]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True) as process:
        os.close(theirs)
        assert b"ready" in os.read(ours, 100)
        os.close(ours)
        assert process.wait(30) == 129


@pytest.mark.parametrize(("stop", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_stop_waits_for_an_import_that_would_swallow_it(
    stop: signal.Signals, expected: int, cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(path: Path) -> None:
        sys.modules.pop("swallowing", None)
        import_module("swallowing")
        sleep(10)

    (tmp_path / "swallowing.py").write_text(
        f"import signal\ntry:\n    signal.raise_signal({stop:d})\nexcept BaseException:\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("ptq_tdq.cli.inspect.read_artifact", load)
    monkeypatch.setattr("ptq_tdq.cli.main.WAIT", 0.01)
    before = signal.signal(stop, signal.default_int_handler)  # a background job of a shell ignores Ctrl-C
    began = perf_counter()
    try:
        result = cli("inspect", "out")
    finally:
        signal.signal(stop, before)
    assert (result.code, result.err.strip()) == (expected, "Stopped.")
    assert perf_counter() - began < 5
