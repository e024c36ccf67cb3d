"""``export``, ``inspect``, ``sample``, and what every command prints where."""

from __future__ import annotations

import csv
import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from hostile import run_python
from PIL import Image
from safetensors.torch import load_file

from ptq_tdq.cli import main as entry

COLUMNS = ["layer", "t", "scale", "zero_point", "qmin", "qmax", "lo", "hi"]


def read_table(path: Path) -> dict[str, list[Any]]:
    if path.suffix == ".csv":
        with path.open(newline="") as file:
            rows = list(csv.reader(file))
        columns = zip(*rows[1:], strict=True)
        return {
            name: list(column) if name == "layer" else [float(text) for text in column]
            for name, column in zip(rows[0], columns, strict=True)
        }
    if path.suffix == ".json":
        table: dict[str, list[Any]] = json.loads(path.read_text())
        return table
    with np.load(path) as arrays:
        return {name: arrays[name].tolist() for name in arrays.files}


@pytest.mark.parametrize("kind", ["csv", "json", "npz"])
def test_export_writes_the_tables_of_the_artifact(
    kind: str, cli: Any, calibrated: Any, pipeline: Path, tmp_path: Path
) -> None:
    file = tmp_path / f"tables.{kind}"
    result = cli("export", calibrated(pipeline), "--format", kind, "--output", file)
    assert (result.code, result.out, result.err) == (0, "", f"Wrote {file}\n")
    table = read_table(file)
    assert list(table) == COLUMNS
    stored = load_file(calibrated(pipeline) / "interval_tables.safetensors")
    names = list(dict.fromkeys(table["layer"]))
    assert {f"{name}.{part}" for name in names for part in ("scale", "zero_point")} == set(stored)
    assert len(table["t"]) == 1001 * len(names)
    assert torch.equal(torch.tensor(table["scale"]), torch.cat([stored[f"{name}.scale"] for name in names]))
    for i in (0, 1000, len(table["t"]) - 1):
        low = table["scale"][i] * (table["qmin"][i] - table["zero_point"][i])
        assert table["lo"][i] == pytest.approx(low, rel=1e-6)


def test_inspect_shows_every_name_in_full_off_a_terminal(cli: Any, calibrated: Any, pipeline: Path) -> None:
    text = cli("inspect", calibrated(pipeline))
    assert (text.code, text.err) == (0, "")
    summary = json.loads(cli("inspect", calibrated(pipeline), "--json").out)
    for row in (*summary["weights"], *summary["quantizers"]):
        assert row["name"] in text.out
    assert "…" not in text.out and "from 0 to 1000" in text.out
    learned = summary["metrics"]["learned"]["latent_sqnr_db"]
    assert f"SQNR of the final latents: {learned:.2f} dB learned" in text.out


@pytest.mark.parametrize("images", [1, 3, 10])
def test_sample_draws_both_models_side_by_side(
    images: int, cli: Any, calibrated: Any, conditional: Path, tmp_path: Path
) -> None:
    picture = tmp_path / "samples.png"
    flags = ("--num-images", images, "--num-inference-steps", 2, "--threads", 1)
    result = cli("sample", calibrated(conditional), "--output", picture, *flags)
    assert result.code == 0 and result.err == ""
    assert f"{images} samples, 2 steps of DDIMScheduler" in result.out
    columns = {1: 1, 3: 3, 10: 3}[images]  # a column for each of the three classes
    with Image.open(picture) as image:
        image.load()
        rows = -(-images // columns)
        assert image.format == "PNG"
        assert image.size == (2 * columns * 8 * 3 + 4 * 3, rows * (8 * 3 + 14) + 14)  # a caption per picture and title
        assert len(image.getcolors(1 << 20)) > 10


def test_sample_is_repeatable_and_follows_the_seed(
    cli: Any, calibrated: Any, conditional: Path, tmp_path: Path
) -> None:
    pictures = []
    for i, seed in enumerate((0, 0, 1)):
        flags = ("--num-images", 2, "--num-inference-steps", 2, "--threads", 1, "--seed", seed, "--json")
        result = cli("sample", calibrated(conditional), "--output", tmp_path / f"{i}.png", *flags)
        facts = json.loads(result.out)
        assert facts["num_images"] == 2 and facts["artifacts"][0]["latent_sqnr_db"] > 0
        pictures.append((tmp_path / f"{i}.png").read_bytes())
    assert pictures[0] == pictures[1] != pictures[2]


QUICK = ("--method", "static", "--set", "activation_iterations=0", "--set", "rounding=nearest")


def test_off_a_terminal_calibrate_prints_the_result_and_nothing_else(
    cli: Any, small: tuple[str, ...], pipeline: Path, tmp_path: Path
) -> None:
    run = ("calibrate", "--model", pipeline, "--output-dir", tmp_path / "out", *small, *QUICK, "--overwrite")
    plain = cli(*run)
    assert (plain.code, plain.err) == (0, "")
    for expected in ("static (MSE)", "prediction, t = 750", "final latents", f"Wrote {tmp_path / 'out'}"):
        assert expected in plain.out
    assert "weights.safetensors" in plain.out

    as_json = cli(*run, "--json")
    metrics = json.loads(as_json.out)
    assert as_json.err == "" and metrics["output_dir"] == str(tmp_path / "out")
    assert list(metrics["learned"]["noise_sqnr_db"]) == ["0", "250", "500", "750"]
    assert metrics["samples"] == 2

    quiet = cli(*run, "--quiet", "--evaluation-samples", "0")
    assert (quiet.code, quiet.out, quiet.err) == (0, "", "")
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert sorted(metrics) == [
        "coverage",
        "mean_bits",
        "notices",
        "reconstruction",
    ]  # what learning itself knows; nothing was measured

    verbose = cli(*run, "--verbose", "--evaluation-samples", "0")
    assert verbose.code == 0 and "static (MSE)" not in verbose.out and f"Wrote {tmp_path / 'out'}" in verbose.out
    assert "Preset default: scheme W4A8" in verbose.err and "weights 1/" in verbose.err


@pytest.mark.parametrize("command", list(entry.COMMANDS))
def test_every_flag_is_explained(command: str, cli: Any) -> None:
    shown = cli(command, "--help")
    assert shown.code == 0 and shown.err == ""
    assert shown.out.startswith(f"Usage: ptq-tdq {command} [OPTIONS]")


@pytest.mark.parametrize("name", list(entry.COMMANDS))
def test_every_command_gives_its_result_as_json(name: str) -> None:
    command = entry.cli.get_command(click.Context(entry.cli), name)
    assert command is not None
    (option,) = (parameter for parameter in command.params if "--json" in parameter.opts)
    assert option.name == "as_json" and getattr(option, "is_flag", False)


def test_the_bare_command_lists_the_commands(cli: Any) -> None:
    shown = cli()
    assert shown.code == 2
    for command in entry.COMMANDS:
        assert f"  {command} " in shown.out + shown.err
    assert cli("--version").out.startswith("ptq-tdq, version ")


def test_the_list_of_commands_quotes_their_own_help() -> None:
    for name, text in entry.COMMANDS.items():
        command = entry.cli.get_command(click.Context(entry.cli), name)
        assert command is not None and command.help is not None
        assert " ".join(command.help.partition("\n\n")[0].split()) == text


AT_A_KEY = {"_PTQ_TDQ_COMPLETE": "bash_complete", "COMP_WORDS": "ptq-tdq cal", "COMP_CWORD": "1"}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(
    "end", ["--help >/dev/full", "choices --json >/dev/full", "--help >&-", "choices --json >&- 2>&-"]
)
def test_a_stdout_that_takes_nothing_is_no_traceback(end: str) -> None:
    done = subprocess.run(["sh", "-c", f"'{sys.executable}' -P -m ptq_tdq {end}"], capture_output=True, text=True)
    if "full" in end:
        assert done.returncode == 1 and done.stderr.startswith("Error: The result cannot be written (No space left")
        assert done.stderr.count("\n") == 1
    else:
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_an_output_whose_name_is_no_text_is_told(calibrated: Any, pipeline: Path, tmp_path: Path) -> None:
    out = tmp_path / os.fsdecode(b"a\xff")
    command = ("report", calibrated(pipeline), "--samples", "0", "--output-dir", out)
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}  # as in most places
    done = subprocess.run([sys.executable, "-P", "-m", "ptq_tdq", *command], env=environment, capture_output=True)
    assert done.returncode == 0 and rb"a\udcff/report.html" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("number", "text"),
    [(errno.ENOSPC, "No space left"), (errno.EFBIG, "File too large"), (errno.ENOENT, "No usable temporary directory")],
)
def test_a_full_disk_is_not_taken_for_stdout(
    number: int, text: str, cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path) -> None:
        raise OSError(number, text)

    monkeypatch.setattr("ptq_tdq.cli.inspect.read_artifact", fail)
    result = cli("inspect", tmp_path)
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith(f"Error: A temporary file cannot be written ({text}); ") and "TMPDIR" in result.err


@pytest.mark.parametrize(("environment", "expected"), [({}, "Commands:"), (AT_A_KEY, "plain,calibrate\n")])
def test_help_and_completion_import_neither_torch_nor_diffusers(environment: dict[str, str], expected: str) -> None:
    script = f"""
import os, sys
from ptq_tdq.cli.main import main
os.environ |= {environment}
try:
    main(["--help"])
except SystemExit as stop:
    assert not stop.code
print(sorted({{"torch", "diffusers", "scipy", "pandas"}} & set(sys.modules)))
"""
    done = run_python(script)
    assert done.returncode == 0 and done.stdout.endswith("[]\n") and expected in done.stdout, done.stderr
