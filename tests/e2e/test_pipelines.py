"""Pipelines with prompts, classes, guidance, video and sound: each command after the other, as a user runs them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from pipelines import PIPELINES, SmallPipeline

from ptq_tdq import load_quantized
from ptq_tdq.artifacts import read_artifact

QUICK = (
    *("--samples-per-step", "2", "--calibration-steps", "2", "--num-inference-steps", "3", "--evaluation-samples", "2"),
    *("--set", "activation_iterations=2", "--set", "weight_iterations=2", "--set", "thinning=1"),
    *("--set", "batch_size=4", "--threads", "1"),
    *("--set", "activation_range=minmax", "--set", "weight_range=minmax"),
)
FEW = ("--num-inference-steps", "2", "--threads", "1")
FLAGS = ("guidance_scale", "height", "width")  # arguments with a flag of their own
SOUND = "StableAudioPipeline"
CONDITIONED = [entry for entry in PIPELINES if entry.condition]
# Pictures of prompts and of classes, video, sound.
DRAWN = ("StableDiffusionXLPipeline", "DiTPipeline", "LTXPipeline", SOUND)
PLAIN = ("--method", "step-table", "--set", "round_again=false")  # of the others nothing is chosen


@dataclass(frozen=True)
class Calibrated:
    """A saved pipeline, what its denoiser is called, and the artifact that a command has made of it."""

    entry: SmallPipeline
    folder: Path
    artifact: Path


@pytest.fixture(scope="module", params=CONDITIONED, ids=lambda entry: entry.name)
def made(request: pytest.FixtureRequest, cli: Any, tmp_path_factory: pytest.TempPathFactory) -> Calibrated:
    entry: SmallPipeline = request.param
    folder = tmp_path_factory.mktemp(entry.name)
    entry.save(folder / "model")
    flags: list[object] = ["--component", entry.denoiser]
    for key, value in entry.call.items():
        if key in FLAGS:
            flags += [f"--{key.replace('_', '-')}", value]
        elif key not in ("num_inference_steps", "output_type"):
            flags += ["--call", f"{key}={json.dumps(value)}"]
    flags += [] if entry.name in DRAWN else PLAIN
    result = cli("calibrate", "--model", folder / "model", "--output-dir", folder / "out", *flags, *QUICK)
    assert result.code == 0, result.err
    assert "predict" in result.out and "Wrote" in result.out
    return Calibrated(entry, folder / "model", folder / "out")


def test_the_artifact_says_what_it_is_of(made: Calibrated) -> None:
    config = read_artifact(made.artifact).config
    assert config["base_model"]["component"] == made.entry.denoiser
    assert config["calibration_set"]["sampler"] == made.entry.name
    assert config["model_config"]["_class_name"] == type(build(made)).__name__


def build(made: Calibrated) -> torch.nn.Module:
    module = getattr(DiffusionPipeline.from_pretrained(made.folder, local_files_only=True), made.entry.denoiser)
    assert isinstance(module, torch.nn.Module)
    return module


@pytest.mark.parametrize("backend", ["simulated", "integer"])
def test_one_line_puts_it_back_into_its_pipeline(made: Calibrated, backend: Any) -> None:
    pipe = DiffusionPipeline.from_pretrained(made.folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    condition = {"prompt": "A red fox"} if made.entry.condition == "prompt" else {"class_labels": [1]}

    def sample() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.as_tensor(pipe(**condition, **made.entry.call, generator=generator, return_dict=False)[0])

    full = sample()
    setattr(pipe, made.entry.denoiser, load_quantized(made.artifact, backend=backend))
    quantized = sample()
    assert quantized.shape == full.shape and bool(quantized.isfinite().all())
    assert 0 < (quantized - full).norm() < full.norm()


def test_sample_draws_both_models_and_evaluate_measures_them(made: Calibrated, cli: Any, tmp_path: Path) -> None:
    picture = tmp_path / "samples.png"
    result = cli("sample", made.artifact, "--num-images", 2, "--output", picture, *FEW)
    assert result.code == 0, result.err
    assert picture.exists() == (made.entry.name != SOUND)
    if picture.exists():
        with Image.open(picture) as image:
            assert image.format == "PNG"
    result = cli("evaluate", made.artifact, "--samples", 8, "--json", *FEW)
    assert result.code == 0, result.err
    assert json.loads(result.out)["quantized"]["latent_sqnr_db"] > 0


def test_the_report_is_one_page(made: Calibrated, cli: Any, tmp_path: Path) -> None:
    if made.entry.name not in DRAWN:
        pytest.skip("drawn as others are")
    result = cli("report", made.artifact, "--output-dir", tmp_path / "report", "--samples", 2, *FEW)
    assert result.code == 0, result.err
    (page,) = (tmp_path / "report").glob("*.html")
    assert read_artifact(made.artifact).layers[0].name in page.read_text()


def test_tables_are_exported_in_the_schedulers_t(made: Calibrated, cli: Any, tmp_path: Path) -> None:
    result = cli("export", made.artifact, "--format", "csv", "--output", tmp_path / "tables.csv")
    assert result.code == 0, result.err
    frame = pd.read_csv(tmp_path / "tables.csv")
    assert sorted(frame["t"].unique()) == list(range(1001))
    assert (frame["scale"] > 0).all() and frame["scale"].map(float).notna().all()


def test_prompts_classes_and_guidance_follow_the_calibration(made: Calibrated, cli: Any, tmp_path: Path) -> None:
    recipe = read_artifact(made.artifact).config["calibration_set"]
    call = {key: value for key, value in made.entry.call.items() if key not in ("num_inference_steps", "output_type")}
    assert recipe["call"] == call
    wrong: Callable[..., Any] = cli
    result = wrong("sample", made.artifact, "--call", "no_such=1", "--output", tmp_path / "x.png", *FEW)
    assert result.code == 2 and "takes no argument 'no_such'" in result.err


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_from_calibration_to_samples(dtype: str, cli: Any, tmp_path: Path) -> None:
    entry = next(entry for entry in PIPELINES if entry.name == "StableDiffusion3Pipeline")
    entry.save(tmp_path / "model")
    size = ("--height", 16, "--width", 16, "--call", "max_sequence_length=64")
    flags = ("--model", tmp_path / "model", "--output-dir", tmp_path / "out", "--dtype", dtype, *size)
    result = cli("calibrate", *flags, *QUICK)
    assert result.code == 0, result.err
    assert load_quantized(tmp_path / "out").dtype == getattr(torch, dtype)
    for backend in ("simulated", "integer"):
        flags = ("--backend", backend, "--num-images", 2, "--json", "--output", tmp_path / "x.png", *FEW)
        result = cli("sample", tmp_path / "out", *flags)
        assert result.code == 0, result.err
        assert json.loads(result.out)["artifacts"][0]["latent_sqnr_db"] > 10
