"""Models small enough to calibrate in a second, saved as a user has them, and the command line run in this process."""

from __future__ import annotations

import contextlib
import io
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel

from ptq_tdq.cli.main import main

# A run of seconds; every test that compares two runs uses the same choices.
SMALL = (
    *("--samples-per-step", "4", "--calibration-steps", "3", "--num-inference-steps", "4"),
    *("--set", "weight_iterations=3", "--set", "activation_iterations=3", "--set", "batch_size=4"),
    *("--scheme", "W4A8", "--seed", "0", "--set", "weight_lr=0.01"),
    *("--set", "activation_range=minmax", "--set", "weight_range=minmax"),
    *("--evaluation-samples", "2", "--threads", "1"),
)


@dataclass(frozen=True)
class Result:
    """How a run of the command line ended."""

    code: int
    out: str
    err: str


def run_cli(*args: object) -> Result:
    """Run ``ptq-tdq`` as the console script does."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(arg) for arg in args])
        except SystemExit as error:
            code = int(error.code or 0)
    return Result(code, out.getvalue(), err.getvalue())


def make_unet(num_class_embeds: int | None = None, **changes: Any) -> UNet2DModel:
    """Build a U-Net with random weights, one attention block and split shortcuts."""
    torch.manual_seed(0)
    options = {
        "sample_size": 8,
        "block_out_channels": (8,),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",),
        "norm_num_groups": 4,
        "num_class_embeds": num_class_embeds,
    }
    return UNet2DModel(**(options | changes)).eval().requires_grad_(False)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="session")
def cli() -> Callable[..., Result]:
    return run_cli


@pytest.fixture(scope="session")
def small() -> tuple[str, ...]:
    return SMALL


@pytest.fixture(scope="session")
def unet() -> Callable[..., UNet2DModel]:
    return make_unet


@pytest.fixture(scope="session")
def contents() -> Callable[[Path], dict[str, bytes]]:
    return bytes_of


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def environment(shared_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep calibration sets away from the user's, and the hub out of reach."""
    monkeypatch.setenv("PTQ_TDQ_CACHE", str(shared_cache))
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save an unconditional pixel-space pipeline."""
    folder = tmp_path_factory.mktemp("models") / "pipeline"
    DDPMPipeline(make_unet(), DDPMScheduler()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def conditional(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a bare class-conditional U-Net with a DDIM scheduler beside its weights."""
    folder = tmp_path_factory.mktemp("models") / "conditional"
    make_unet(num_class_embeds=3).save_pretrained(folder)
    DDIMScheduler().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def calibrated(shared_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """Artifacts by model folder, each made once, without interruption; tests must not change them."""
    made: dict[Path, Path] = {}

    def artifact_of(model: Path) -> Path:
        if model not in made:
            folder = tmp_path_factory.mktemp("artifacts") / "out"
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("PTQ_TDQ_CACHE", str(shared_cache))
                result = run_cli("calibrate", "--model", model, "--output-dir", folder, *SMALL)
            assert result.code == 0, result.err
            made[model] = folder
        return made[model]

    return artifact_of


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Path], Path]:
    """A copy that a test may damage."""

    def copy(folder: Path) -> Path:
        return Path(shutil.copytree(folder, tmp_path / folder.name))

    return copy
