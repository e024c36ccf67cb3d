"""Fine-tuning by command: its result, its interruption, data in files, and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import launched, running
from PIL import Image

from ptq_tdq.artifacts import read_artifact
from ptq_tdq.atomic import alone

FEW = (
    *("--iterations", "6", "--trajectories", "16", "--batch-size", "8"),
    *("--set", "num_inference_steps=4", "--set", "warmup=1", "--set", "checkpoint_every=2"),
    *("--set", "compute_dtype=float32"),
    *("--evaluation-samples", "2", "--threads", "1"),
)


@pytest.fixture(scope="module")
def artifact(calibrated: Callable[[Path], Path], conditional: Path) -> Path:
    return calibrated(conditional)


@pytest.fixture(scope="module")
def run(artifact: Path, conditional: Path, cli: Any, shared_cache: Path, tmp_path_factory: Any) -> tuple[Any, Path]:
    """An uninterrupted run, and what it writes."""
    folder = tmp_path_factory.mktemp("tuned") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PTQ_TDQ_CACHE", str(shared_cache))
        result = cli("finetune", artifact, "--model", conditional, "--output-dir", folder, *FEW, "-v")
    assert result.code == 0, result.err
    return result, folder


@pytest.fixture(scope="module")
def whole(run: tuple[Any, Path]) -> Path:
    return run[1]


def test_every_command_takes_the_result(
    artifact: Path, whole: Path, cli: Any, conditional: Path, tmp_path: Path
) -> None:
    document = read_artifact(whole).config
    assert document["finetune"]["choices"]["iterations"] == 6
    assert cli("inspect", whole).code == 0
    exported = cli("export", whole, "--format", "json", "--output", tmp_path / "tables.json")
    assert exported.code == 0, exported.err
    request = ("evaluate", whole, "--model", conditional, "--samples", 8, "--num-inference-steps", 2, "--json")
    measured = cli(*request, "--backend", "integer", "--threads", 1)
    assert measured.code == 0, measured.err
    assert json.loads(measured.out)["samples"] == 8
    onnx = tmp_path / "model.onnx"
    exported = cli("export", whole, "--format", "onnx", "--model", conditional, "--output", onnx)
    assert exported.code == 0 and onnx.exists(), exported.err
    picture = (artifact, whole, "--output", tmp_path / "grid.png", "--num-images", 4, "--num-inference-steps", 2)
    sampled = cli("sample", *picture, "--model", conditional, "--json")
    assert [x["title"] for x in json.loads(sampled.out)["artifacts"]] == ["W4A8 auto", "W4A8 auto lsq"]
    with Image.open(tmp_path / "grid.png") as image:  # three panels, a column for each class
        assert image.width == 3 * 3 * 8 * 3 + 2 * 4 * 3
    shown = ("--model", conditional, "--samples", 2, "--num-inference-steps", 2, "--threads", 1)
    reported = cli("report", whole, "--output-dir", tmp_path / "report", *shown)
    assert reported.code == 0, reported.err
    text = re.search(r'id="data">(.*?)</script>', (tmp_path / "report" / "report.html").read_text(), re.S)
    assert text
    found, known = json.loads(text[1])["artifacts"][0]["finetune"], read_artifact(whole).metrics["finetune"]
    assert found["quantizer"] == "lsq" and found["after"] == known["held_out"]["after"]
    assert found["losses"]["t"] == [1, 2, 3, 4, 5, 6]


def test_the_result_is_shown_beside_the_calibrated_model(run: tuple[Any, Path]) -> None:
    shown, folder = run
    assert "fine-tuned" in shown.out and "final latents (SQNR, dB)" in shown.out
    assert "iteration 6/6 loss" in shown.err and "minutes left" in shown.err
    metrics = read_artifact(folder).metrics["finetune"]
    assert sorted(metrics) == ["calibrated", "fine-tuned", "held_out", "losses"]
    assert sorted(path.name for path in folder.parent.iterdir()) == ["out"]


def test_a_killed_run_ends_with_the_same_bytes(
    artifact: Path, conditional: Path, whole: Path, cli: Any, contents: Any, tmp_path: Path
) -> None:
    out, partial = tmp_path / "out", tmp_path / "out.partial" / "finetune-0000.safetensors"
    command = ("finetune", artifact, "--model", conditional, "--output-dir", out, *FEW)
    with running(*command) as process:
        process.wait_for(partial.exists)
    assert partial.exists() and not out.exists()
    with alone(partial.parent):
        refused = cli(*command)
    assert refused.code == 1 and "Another run works in" in refused.err
    refused = cli(*command, "--seed", "1")
    assert refused.code == 1 and "start with --no-resume" in refused.err
    result = cli(*command)
    assert result.code == 0, result.err
    assert contents(out) == contents(whole)


def test_two_processes_learn_what_one_does(artifact: Path, conditional: Path, whole: Path, tmp_path: Path) -> None:
    """To the digits that another order of sums leaves, until a value rounds to another code; one writes and speaks."""
    command = ("finetune", artifact, "--model", conditional, "--output-dir", tmp_path / "out", *FEW, "--json")
    with launched(2, *command) as commands:
        ends = [process.end() for process in commands]
    assert [code for code, *_ in ends] == [0, 0], ends
    one, two = read_artifact(whole), read_artifact(tmp_path / "out")
    assert json.loads(ends[0][1])["finetune"] == two.metrics["finetune"]
    losses = [[x["loss"] for x in found.metrics["finetune"]["losses"]] for found in (one, two)]
    assert losses[0][:3] == pytest.approx(losses[1][:3], rel=1e-5)
    assert losses[0] == pytest.approx(losses[1], rel=5e-2)
    for name, scale in one.weight_scale.items():
        torch.testing.assert_close(two.weight_scale[name], scale, rtol=1e-2, atol=0)
    assert ends[1][1:] == ("", "")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_images_and_latents_are_learned_from(artifact: Path, conditional: Path, cli: Any, tmp_path: Path) -> None:
    """A folder of images for each class, and a file of the same images: the same run, to the bit."""
    pixels = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        folder = tmp_path / "images" / f"class{i // 4}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{i:02d}.png")
    np.savez(tmp_path / "images.npz", images=pixels, labels=np.arange(12) // 4)
    found = []
    for name in ("images", "images.npz"):
        out = tmp_path / f"of-{name}"
        request = ("finetune", artifact, "--model", conditional, "--data", tmp_path / name, "--output-dir", out)
        result = cli(*request, *FEW)
        assert result.code == 0, result.err
        found.append(read_artifact(out).metrics["finetune"])
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--quantizer", "dorefa"), "The quantizer must be one of duq, lsq, nipq, pact, qil. Got 'dorefa' instead."),
        (("--set", "speed=1"), "There is no choice named 'speed'"),
        (("--set", "iterations"), "--set takes KEY=VALUE. Got 'iterations' instead."),
        (("--loss", "denoising"), "The loss 'denoising' needs images or latents (data)"),
        (("--data", "nowhere"), "There is no file or folder 'nowhere'"),
        (("--data", "labels.npz"), "'labels.npz' has neither 'images' nor 'latents'; it has labels."),
        (("--data", "small.npz"), "The model samples [3, 8, 8], and 'small.npz' holds [3, 4, 4]"),
        (("--data", "unlabelled.npz"), "does not hold a class from 0 to 2 for each of its 4 samples"),
        (("--model", "other"), "was made from"),
    ],
)
def test_wrong_requests_are_one_sentence(
    arguments: tuple[str, str],
    text: str,
    artifact: Path,
    conditional: Path,
    pipeline: Path,
    cli: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("labels.npz", labels=np.zeros(4, int))
    np.savez("small.npz", images=np.zeros((4, 4, 4, 3), np.uint8), labels=np.zeros(4, int))
    np.savez("unlabelled.npz", images=np.zeros((4, 8, 8, 3), np.uint8))
    shutil.copytree(pipeline, "other")
    result = cli("finetune", artifact, "--model", conditional, "--output-dir", "out", *FEW, *arguments)
    assert result.code in (1, 2) and text in result.err and len(result.err.splitlines()) == 1
    assert not Path("out").exists() and not Path("out.partial").exists()


def test_a_disk_without_room_for_checkpoints_is_refused_at_once(
    artifact: Path, conditional: Path, cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(9000, 8000, 1000))  # type: ignore[attr-defined]
    result = cli("finetune", artifact, "--model", conditional, "--output-dir", tmp_path / "out", *FEW)
    assert result.code == 1 and len(result.err.splitlines()) == 1 and list(tmp_path.iterdir()) == []
    assert "KiB of disk, of which 0.977 KiB are free in" in result.err
