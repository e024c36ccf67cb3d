"""The training script of the reference model: its schedule, its batches and, slowly, all stages on a few images."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from reference_model import unet

    return unet


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from reference_model import loop

    return loop


def test_the_rate_warms_up_and_falls_to_zero(loop: ModuleType) -> None:
    rates = [loop.learning_rate(step, 1.0, 10, (50, 1.0), 100) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9:51] == [1.0] * 42
    assert rates[75] == pytest.approx(0.5)
    assert rates[100] == 0


def test_a_batch_is_the_forward_process_at_stratified_steps(stage: ModuleType) -> None:
    alphas = DDIMScheduler(**stage.SCHEDULER).alphas_cumprod
    latents, labels = torch.ones(2, 6, 4, 16, 16).half(), torch.arange(6)
    x, t, classes, noise = stage.noise_batch(latents, labels, alphas, 100, torch.Generator().manual_seed(0))
    assert t.div(10, rounding_mode="floor").tolist() == list(range(100))
    assert 0 < int((classes == stage.NO_CLASS).sum()) < 30
    a = alphas[t].view(-1, 1, 1, 1)
    torch.testing.assert_close(x, a.sqrt() + (1 - a).sqrt() * noise)


@pytest.mark.slow
def test_every_stage_runs_on_a_folder_of_images_and_resumes(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for name in ("cats", "dogs"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(6):
            pixels = generator.integers(0, 256, (40, 40, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.png")

    def run(*arguments: str) -> str:
        command = [sys.executable, str(BENCHMARKS / "train_reference.py")]
        command += ["--data", str(tmp_path / "images"), "--work", str(tmp_path / "work"), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    run("vae", "--steps", "2", "--batch", "4")
    run("decoder", "--steps", "2", "--batch", "4")
    for steps in ("2", "3"):
        run("unet", "--steps", steps, "--batch", "4", "--checkpoint-every", "1")
    assert torch.load(tmp_path / "work" / "unet.ckpt", weights_only=True)["step"] == 3
    lines = run("evaluate", "--samples", "4", "--steps", "2", "--reconstructions", "4").splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["images"] for record in records] == [12, 4, 4, 4]
    assert all(record["fd_c10"] > 0 for record in records)
