"""``ptq-tdq calibrate`` on the layouts in which users have their models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cifar10 import CIFAR10_INDEX, CIFAR10_SCHEDULER, CIFAR10_UNET
from diffusers import UNet2DModel
from jsonschema import Draft202012Validator
from PIL import Image

from ptq_tdq import load_model, load_quantized
from ptq_tdq.artifacts import schema
from ptq_tdq.calib_data import first_call
from ptq_tdq.choices import described, ungrouped
from ptq_tdq.config import Config
from ptq_tdq.plan import make_plan

FILES = ["README.md", "interval_tables.safetensors", "metrics.json", "ptq_tdq_config.json", "weights.safetensors"]


def check_artifact(folder: Path) -> dict[str, Any]:
    assert sorted(path.name for path in folder.iterdir()) == FILES
    document: dict[str, Any] = json.loads((folder / "ptq_tdq_config.json").read_text())
    Draft202012Validator(schema()).validate(document)
    assert not folder.with_name(f"{folder.name}.partial").exists()
    return document


@pytest.mark.parametrize("name", ["pipeline", "conditional"])
def test_pipelines_and_classes(name: str, calibrated: Callable[[Path], Path], request: pytest.FixtureRequest) -> None:
    document = check_artifact(calibrated(request.getfixturevalue(name)))
    assert document["time_axis"]["num_train_timesteps"] == 1000
    assert document["calibration_set"]["num_classes"] == {"pipeline": 0, "conditional": 3}[name]
    assert set(ungrouped(document["choices"])) == set(described(Config))


def test_a_bare_folder_says_that_it_guesses_the_scheduler(
    cli: Any, small: tuple[str, ...], unet: Callable[..., UNet2DModel], tmp_path: Path
) -> None:
    unet().save_pretrained(tmp_path / "bare")
    out = tmp_path / "missing" / "parent" / "out"
    result = cli("calibrate", "--model", tmp_path / "bare", "--output-dir", out, *small, "--method", "static")
    assert result.code == 0
    assert result.err.splitlines() == [
        f"'{tmp_path / 'bare'}' has no scheduler_config.json; using DDPMScheduler with its defaults."
    ]
    check_artifact(out)


@pytest.fixture
def cifar10(unet: Callable[..., UNet2DModel], tmp_path: Path) -> Callable[..., Path]:
    """A folder as the hub's google/ddpm-cifar10-32, with other widths or sizes."""

    def save(**changes: Any) -> Path:
        folder = tmp_path / "ddpm-cifar10-32"
        unet(**{**CIFAR10_UNET, **changes}).save_pretrained(folder)
        (folder / "scheduler_config.json").write_text(json.dumps(CIFAR10_SCHEDULER))
        (folder / "model_index.json").write_text(json.dumps(CIFAR10_INDEX))
        return folder

    return save


def test_ddpm_cifar10_32_with_narrow_layers(
    cli: Any, small: tuple[str, ...], cifar10: Callable[..., Path], tmp_path: Path
) -> None:
    model = cifar10(block_out_channels=[4, 8, 8, 8], norm_num_groups=4, sample_size=16)
    out = tmp_path / "out"
    quick = ("--method", "static", "--set", "rounding=nearest", "--set", "activation_iterations=0")
    result = cli("calibrate", "--model", model, "--output-dir", out, *small, *quick)
    assert (result.code, result.err) == (0, "")
    document = check_artifact(out)
    assert document["base_model"]["id"] == str(model)
    splits = [layer["name"] for layer in document["layers"] if len(layer["splits"]) > 2]
    assert len(splits) == 12  # four up blocks of three residual blocks, each with a shortcut over h and skip
    picture = tmp_path / "samples.png"
    flags = ("--num-images", "2", "--num-inference-steps", "2", "--threads", "1", "--output", picture)
    assert cli("sample", out, *flags).code == 0
    with Image.open(picture) as image:
        assert image.format == "PNG"


def test_ddpm_cifar10_32_at_full_width_loads_and_can_be_planned(cifar10: Callable[..., Path]) -> None:
    model = load_model(str(cifar10()))
    assert sum(p.numel() for p in model.denoiser.parameters()) == 35_746_307  # the hub's model card: 35.7M
    plan = make_plan(model.denoiser, Config(), first_call(model, 2))
    spatial = [record.name for record in plan.layers if record.kind == "conv2d"]
    assert spatial[0] == "conv_in" and spatial[-1] == "conv_out"
    assert len([record for record in plan.layers if record.kind == "product"]) == 6  # 2 down, 1 mid, 3 up
    assert (plan.coverage, plan.notices) == (1.0, ())


def test_a_hub_id_offline_is_one_clear_line(cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # read from the environment at import
    result = cli("calibrate", "--model", "google/ddpm-cifar10-32", "--output-dir", tmp_path / "out")
    assert result.code == 1 and result.out == ""
    assert result.err == (
        "Error: 'google/ddpm-cifar10-32' is no local folder and the hub could not be reached; "
        "pass the path of a diffusers folder.\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_folder_named_like_a_hub_id_is_recorded_as_a_folder(
    cli: Any, small: tuple[str, ...], pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(pipeline.parent)
    out = tmp_path / "out"
    quick = ("--method", "static", "--set", "activation_iterations=0", "--set", "rounding=nearest")
    assert cli("calibrate", "--model", pipeline.name, "--output-dir", out, *small, *quick, "-q").code == 0
    assert check_artifact(out)["base_model"]["id"] == f"./{pipeline.name}"
    assert "base_model:" not in (out / "README.md").read_text()
    assert load_quantized(out).config.sample_size == 8
    monkeypatch.chdir(tmp_path)
    result = cli("sample", out)
    assert result.code == 1 and "pass --model with its folder or hub id" in result.err
