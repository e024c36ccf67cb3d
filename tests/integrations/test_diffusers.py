"""Quantized components of diffusers' pipelines, as its own quantization suite tests those of other methods."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from calibrated import QUICK, Calibrated, load
from diffusers import PipelineQuantizationConfig, UNet2DConditionModel
from diffusers.quantizers import DiffusersAutoQuantizer
from safetensors.torch import load_file, save_file

from ptq_tdq import calibrate, load_model, load_quantized
from ptq_tdq.cli.main import main
from ptq_tdq.errors import ArtifactCorruptError, ArtifactMismatchError, ConfigError, ModelError
from ptq_tdq.evaluate.metrics import sqnr_db
from ptq_tdq.integrations.diffusers import PtqTdqConfig, as_diffusers

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="session")
def saved(calibrated: Callable[[str], Calibrated], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of StableDiffusion with a quantized U-Net."""
    given = calibrated("StableDiffusionPipeline")
    pipe, folder = given.pipe(), tmp_path_factory.mktemp("saved")
    pipe.unet = as_diffusers(load_quantized(given.artifact))
    pipe.save_pretrained(folder)
    return folder


def test_the_command_writes_the_folder_that_a_pipeline_would(
    stable_diffusion: Calibrated, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(
        [
            "export",
            str(stable_diffusion.artifact),
            "--format",
            "diffusers",
            "--output",
            str(tmp_path / "unet"),
            "--json",
        ]
    )
    assert json.loads(capsys.readouterr().out) == {"written": [str(tmp_path / "unet")]}
    for name in ("config.json", WEIGHTS):
        assert (tmp_path / "unet" / name).read_bytes() == (saved / "unet" / name).read_bytes()


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "DiTPipeline"])
def test_a_saved_pipeline_draws_the_same_and_is_saved_the_same(
    name: str, calibrated: Callable[[str], Calibrated], tmp_path: Path
) -> None:
    given = calibrated(name)
    pipe = given.pipe()
    setattr(pipe, given.entry.denoiser, as_diffusers(load_quantized(given.artifact)))
    assert torch.equal(given.draw(pipe), given.drawn)
    pipe.save_pretrained(tmp_path / "once")
    loaded = load(tmp_path / "once")
    assert type(given.denoiser(loaded)).__name__ == type(given.denoiser(given.pipe())).__name__
    assert torch.equal(given.draw(loaded), given.drawn)
    loaded.save_pretrained(tmp_path / "twice")
    once, twice = (tmp_path / folder / given.entry.denoiser for folder in ("once", "twice"))
    assert (once / WEIGHTS).read_bytes() == (twice / WEIGHTS).read_bytes()
    first, second = (json.loads((folder / "config.json").read_text()) for folder in (once, twice))
    assert first["quantization_config"] == second["quantization_config"]


def test_an_artifact_takes_the_place_of_a_component(stable_diffusion: Calibrated, tmp_path: Path) -> None:
    config = PipelineQuantizationConfig(quant_mapping={"unet": PtqTdqConfig(stable_diffusion.artifact)})
    pipe = load(stable_diffusion.full, quantization_config=config)
    assert torch.equal(stable_diffusion.draw(pipe), stable_diffusion.drawn)
    pipe.unet.save_pretrained(tmp_path)
    assert str(stable_diffusion.artifact) not in (tmp_path / "config.json").read_text()
    pipe.unet = UNet2DConditionModel.from_pretrained(tmp_path)
    assert torch.equal(stable_diffusion.draw(pipe), stable_diffusion.drawn)


def test_shards_are_read_together(stable_diffusion: Calibrated, saved: Path, tmp_path: Path) -> None:
    UNet2DConditionModel.from_pretrained(saved / "unet").save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    pipe = stable_diffusion.pipe()
    pipe.unet = UNet2DConditionModel.from_pretrained(tmp_path)
    assert torch.equal(stable_diffusion.draw(pipe), stable_diffusion.drawn)


def test_intervals_stay_float32_in_half_precision(stable_diffusion: Calibrated, saved: Path, tmp_path: Path) -> None:
    pipe = load(saved, dtype=torch.bfloat16)
    assert {p.dtype for p in pipe.unet.parameters()} == {torch.bfloat16}
    sources = [quantizer.source for quantizer in pipe.unet.hf_quantizer.quantized.quantizers().values()]
    assert {source.scale.dtype for source in sources} == {torch.float32}
    drawn = stable_diffusion.draw(pipe)
    assert drawn.dtype == torch.bfloat16 and sqnr_db(stable_diffusion.drawn, drawn.float()) > 25
    pipe.unet.save_pretrained(tmp_path)
    stored = load_file(tmp_path / WEIGHTS)
    assert {v.dtype for k, v in stored.items() if k.endswith("scale")} == {torch.float32}
    pipe.unet = UNet2DConditionModel.from_pretrained(tmp_path)
    assert torch.equal(stable_diffusion.draw(pipe), drawn)


def test_modules_that_diffusers_keeps_in_float32_are_kept(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(UNet2DConditionModel, "_keep_in_fp32_modules", ["time_embedding"])
    unet = UNet2DConditionModel.from_pretrained(saved / "unet", torch_dtype=torch.float16)
    assert {p.dtype for p in unet.time_embedding.parameters()} == {torch.float32}
    assert {p.dtype for n, p in unet.named_parameters() if "time_embedding" not in n} == {torch.float16}


def test_a_device_map_places_what_was_loaded(stable_diffusion: Calibrated, saved: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(saved / "unet", device_map={"": "cpu"})
    assert not any(tensor.is_meta for tensor in (*unet.parameters(), *unet.buffers()))
    pipe = stable_diffusion.pipe()
    pipe.unet = unet
    assert torch.equal(stable_diffusion.draw(pipe), stable_diffusion.drawn)


def test_a_copy_runs_at_its_own_time_steps(stable_diffusion: Calibrated) -> None:
    pipe = stable_diffusion.pipe()
    pipe.unet = copy.deepcopy(as_diffusers(load_quantized(stable_diffusion.artifact)))
    assert pipe.unet.hf_quantizer.quantized.model is pipe.unet
    assert torch.equal(stable_diffusion.draw(pipe), stable_diffusion.drawn)


@pytest.mark.parametrize("form", [as_diffusers, lambda quantized: quantized])
def test_pickled_it_draws_the_same(stable_diffusion: Calibrated, form: Callable[[Any], Any]) -> None:
    pipe = stable_diffusion.pipe()
    pipe.unet = pickle.loads(pickle.dumps(form(load_quantized(stable_diffusion.artifact))))
    assert torch.equal(stable_diffusion.draw(pipe), stable_diffusion.drawn)


def test_what_diffusers_asks_of_a_method(saved: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(saved / "unet")
    assert unet.is_quantized and unet.config.quantization_config.quant_method == "ptq-tdq"
    assert '"scheme": "W8A8"' in repr(unet.config.quantization_config)
    assert len(repr(unet.config.quantization_config)) < 500
    config = unet.config.quantization_config.to_dict()
    assert json.loads(json.dumps(config)) == config
    assert DiffusersAutoQuantizer.from_dict(config).to_dict() == config
    with pytest.raises(ValueError, match="Casting a quantized model"):
        unet.to(torch.bfloat16)
    with pytest.raises(NotImplementedError):
        unet.dequantize()
    with pytest.raises(ConfigError, match="safetensors only"):
        unet.save_pretrained(saved.parent / "pickle", safe_serialization=False)


def test_a_model_is_not_calibrated_while_it_is_loaded(stable_diffusion: Calibrated, saved: Path) -> None:
    config = PipelineQuantizationConfig(quant_mapping={"unet": PtqTdqConfig()})
    with pytest.raises(ConfigError, match="calibrated before it is loaded"):
        load(stable_diffusion.full, quantization_config=config)
    pipe = stable_diffusion.pipe()
    pipe.unet = UNet2DConditionModel.from_pretrained(saved / "unet")
    with pytest.raises(ModelError, match="quantized already"):
        calibrate(pipe, QUICK, prompts=["A red fox"])
    with pytest.raises(ModelError, match="The unet is quantized already"):
        calibrate(stable_diffusion.quantized(), QUICK, prompts=["A red fox"])


def test_a_model_that_is_no_component_says_how_it_becomes_one(stable_diffusion: Calibrated) -> None:
    said = repr(load_quantized(stable_diffusion.artifact))
    assert said.startswith("<QuantizedModel of UNet2DConditionModel, W8A8 step-table; ") and "as_diffusers" in said
    assert len(said) < 200


def test_a_quantized_model_is_no_source_for_calibration(stable_diffusion: Calibrated, saved: Path) -> None:
    for source in (saved, saved / "unet", stable_diffusion.artifact):
        with pytest.raises(ModelError, match="quantized already; give the full-precision one"):
            load_model(str(source))


def test_a_class_of_ones_own_is_no_component(stable_diffusion: Calibrated) -> None:
    quantized = load_quantized(stable_diffusion.artifact)
    quantized.model = torch.nn.Linear(2, 2)
    with pytest.raises(ModelError, match="A Linear is no model of diffusers"):
        as_diffusers(quantized)


def _without_table(document: Any, tensors: dict[str, Any]) -> None:
    del tensors[next(key for key in tensors if key.startswith("interval_tables."))]


def _with_another_shape(document: Any, tensors: dict[str, Any]) -> None:
    tensors["conv_in.bias"] = tensors["conv_in.bias"][:-1]


def _with_nan(document: Any, tensors: dict[str, Any]) -> None:
    tensors["conv_in.weight_scale"][0] = torch.nan


def _of_another_layer(document: Any, tensors: dict[str, Any]) -> None:
    document["layers"][0]["name"] = "nowhere"


def _with_many_bits(document: Any, tensors: dict[str, Any]) -> None:
    document["layers"][0]["weight_bits"] = 64


def _of_the_future(document: Any, tensors: dict[str, Any]) -> None:
    document["schema_version"] = 99


def _of_no_metrics(document: Any, tensors: dict[str, Any]) -> None:
    document["metrics"] = []


@pytest.mark.parametrize(
    ("alter", "error", "sentence"),
    [
        (_without_table, ArtifactCorruptError, "interval"),
        (_with_another_shape, ArtifactMismatchError, "conv_in.bias"),
        (_with_nan, ArtifactCorruptError, "NaN"),
        (_of_another_layer, ArtifactCorruptError, "nowhere"),
        (_with_many_bits, ArtifactCorruptError, "64"),
        (_of_the_future, ArtifactMismatchError, "schema_version 99"),
        (_of_no_metrics, ArtifactCorruptError, "metrics"),
    ],
)
def test_nothing_of_a_component_is_believed(
    alter: Callable[[Any, Any], None], error: type[Exception], sentence: str, saved: Path, tmp_path: Path
) -> None:
    config, tensors = json.loads((saved / "unet/config.json").read_text()), load_file(saved / "unet" / WEIGHTS)
    alter(config["quantization_config"]["document"], tensors)
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(error, match=sentence):
        UNet2DConditionModel.from_pretrained(tmp_path)


def test_a_file_does_not_name_other_places(stable_diffusion: Calibrated, saved: Path, tmp_path: Path) -> None:
    config = json.loads((saved / "unet/config.json").read_text())
    config["quantization_config"] = {"quant_method": "ptq-tdq", "artifact": str(stable_diffusion.artifact)}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / WEIGHTS).write_bytes((saved / "unet" / WEIGHTS).read_bytes())
    with pytest.raises(ArtifactCorruptError, match="no document"):
        UNet2DConditionModel.from_pretrained(tmp_path)


def test_loading_a_pipeline_reads_no_pickle(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((saved / "unet/config.json").read_bytes())
    torch.save(load_file(saved / "unet" / WEIGHTS), tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(ArtifactCorruptError, match="no safetensors file"):
        UNet2DConditionModel.from_pretrained(tmp_path)
