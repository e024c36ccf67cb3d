"""To the hub and back: the hub's own client against a hub on this machine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from calibrated import Calibrated
from diffusers import DiffusionPipeline
from hub import Files, local_hub
from huggingface_hub import HfApi

from ptq_tdq import load_model, load_quantized
from ptq_tdq.cli.main import main
from ptq_tdq.errors import ArtifactError, OutputError
from ptq_tdq.integrations.diffusers import PtqTdqConfig, as_diffusers


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[dict[str, Files]]:
    with local_hub(tmp_path / "cache") as repositories:
        yield repositories


def test_an_artifact_goes_up_and_comes_down_as_it_is(stable_diffusion: Calibrated, hub: dict[str, Files]) -> None:
    quantized = load_quantized(stable_diffusion.artifact)
    address = quantized.push_to_hub("me/unet", private=True, token="token")
    assert "/me/unet/commit/" in address
    assert hub["me/unet"] == {path.name: path.read_bytes() for path in stable_diffusion.artifact.iterdir()}
    pipe = stable_diffusion.pipe()
    pipe.unet = load_quantized("me/unet")
    assert torch.equal(stable_diffusion.draw(pipe), stable_diffusion.drawn)
    again = quantized.push_to_hub("me/unet", token="token")  # the repository is there
    assert again == address


def test_a_pipeline_goes_up_and_comes_down_with_its_quantized_component(
    stable_diffusion: Calibrated, hub: dict[str, Files]
) -> None:
    pipe = stable_diffusion.quantized()
    pipe.unet = as_diffusers(pipe.unet)
    pipe.push_to_hub("me/pipe", token="token")
    document = json.loads(hub["me/pipe"]["unet/config.json"])["quantization_config"]["document"]
    assert document["scheme"] == "W8A8"
    loaded = DiffusionPipeline.from_pretrained("me/pipe")
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(stable_diffusion.draw(loaded), stable_diffusion.drawn)


def test_an_artifact_of_the_hub_takes_the_place_of_a_component(
    stable_diffusion: Calibrated, hub: dict[str, Files]
) -> None:
    load_quantized(stable_diffusion.artifact).push_to_hub("me/unet", token="token")
    pipe = stable_diffusion.pipe()
    config: Any = PtqTdqConfig("me/unet")
    pipe.unet = type(pipe.unet).from_pretrained(stable_diffusion.full / "unet", quantization_config=config)
    assert torch.equal(stable_diffusion.draw(pipe), stable_diffusion.drawn)


def test_a_pipeline_of_the_hub_is_loaded_for_calibration(stable_diffusion: Calibrated, hub: dict[str, Files]) -> None:
    api = HfApi(token="token")
    api.create_repo("me/full")
    api.upload_folder(repo_id="me/full", folder_path=stable_diffusion.full)
    assert load_model("me/full").sha256 == load_model(str(stable_diffusion.full)).sha256


def test_what_the_hub_has_not_and_what_it_refuses_are_one_sentence(
    stable_diffusion: Calibrated, hub: dict[str, Files], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ArtifactError, match="me/nothing is neither a folder here nor an artifact on the hub"):
        load_quantized("me/nothing")
    with pytest.raises(OutputError, match=r"not uploaded to 'me/unet' \(.*401.*log in"):
        load_quantized(stable_diffusion.artifact).push_to_hub("me/unet", token="another")
    assert hub == {}
    with pytest.raises(SystemExit):
        main(["calibrate", "--model", "me/nothing", "--output-dir", "out"])
    assert "nor a public hub repository 'me/nothing'" in capsys.readouterr().err
