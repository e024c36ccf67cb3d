from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from cifar10 import CIFAR10_INDEX, CIFAR10_SCHEDULER, CIFAR10_UNET
from diffusers import DDIMPipeline, DDIMScheduler, DDPMScheduler, UNet2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ptq_tdq.calib_data import (
    EMBEDDED,
    LoopSampler,
    check_denoiser,
    collect,
    from_pipeline,
    is_embedded,
    load_model,
    with_scheduler,
)
from ptq_tdq.calib_data.source import find_parts
from ptq_tdq.errors import ConfigError, ModelError, NonFiniteError
from ptq_tdq.identity import model_sha256

WEIGHTS = "diffusion_pytorch_model.safetensors"


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content))


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    theirs = b.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in a.state_dict().items())


@pytest.fixture
def bare(unet: UNet2DModel, tmp_path: Path) -> Path:
    folder = tmp_path / "bare"
    unet.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("name", "num_classes", "latent"),
    [("reference", 10, True), ("reference-dit", 10, True), ("reference-pixel", 0, False)],
)
def test_the_embedded_models_sample_latents_or_pixels_of_ten_classes_or_of_none(
    name: str, num_classes: int, latent: bool
) -> None:
    model = load_model(name)
    assert (model.id, model.notices) == (EMBEDDED[name].id, ())
    assert model.sampler.num_classes == num_classes, "label 10 means no class"
    assert isinstance(model.sampler, LoopSampler) and (model.sampler.vae is not None) == latent
    assert model.denoiser.dtype == torch.float32
    assert not model.denoiser.training
    assert not any(parameter.requires_grad for parameter in model.denoiser.parameters())
    by_path = load_model(str(EMBEDDED[name].folder))
    assert (by_path.sha256, by_path.sampler.num_classes) == (model.sha256, num_classes)
    assert is_embedded(model) and is_embedded(by_path)


def test_no_name_is_the_first_embedded_model() -> None:
    assert load_model().sha256 == load_model("reference").sha256


def test_a_pipeline_saved_by_diffusers_loads(unet: UNet2DModel, tmp_path: Path) -> None:
    DDIMPipeline(unet=unet, scheduler=DDIMScheduler(beta_end=0.01)).save_pretrained(tmp_path)
    model = load_model(str(tmp_path))
    assert same_weights(model.denoiser, unet)
    assert isinstance(model.scheduler, DDIMScheduler)
    assert model.scheduler.config.beta_end == 0.01
    assert isinstance(model.sampler, LoopSampler) and model.sampler.vae is None
    assert (model.sampler.num_classes, model.notices, model.id) == (0, (), str(tmp_path))
    bare_part = load_model(str(tmp_path / "unet"))
    assert bare_part.scheduler.config.beta_end == 0.01, "the scheduler beside a bare U-Net folder is found"
    assert bare_part.sha256 == model.sha256


@pytest.mark.parametrize("size", ["10GB", "100KB"])
def test_weights_that_are_saved_as_a_variant_alone_load(unet: UNet2DModel, tmp_path: Path, size: str) -> None:
    DDIMPipeline(unet, DDIMScheduler()).save_pretrained(tmp_path, variant="fp16", max_shard_size=size)
    assert not (tmp_path / "unet" / WEIGHTS).exists()
    assert same_weights(unet, load_model(str(tmp_path)).denoiser)


def test_a_pipeline_with_code_of_its_own_is_loaded_in_python(unet: UNet2DModel, tmp_path: Path) -> None:
    DDIMPipeline(unet, DDIMScheduler()).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    write_json(tmp_path / "model_index.json", index | {"_class_name": ["own", "Own"]})
    (tmp_path / "own.py").write_text("raise SystemExit")
    with pytest.raises(ModelError, match=r"has code of its own \(own\.py\), .* trust_remote_code=True"):
        load_model(str(tmp_path))


def test_a_bare_folder_uses_its_own_scheduler_or_says_that_it_has_none(bare: Path) -> None:
    model = load_model(str(bare))
    assert isinstance(model.scheduler, DDPMScheduler)
    assert len(model.notices) == 1
    assert "DDPMScheduler" in model.notices[0]
    DDIMScheduler().save_pretrained(bare)
    model = load_model(str(bare))
    assert isinstance(model.scheduler, DDIMScheduler)
    assert model.notices == ()


def test_the_layout_of_ddpm_cifar10_32_loads_and_can_be_collected_from(tmp_path: Path) -> None:
    """U-Net at the top level, attention weights under their old names; random weights."""
    unet = {"_class_name": "UNet2DModel", "_diffusers_version": "0.0.4", **CIFAR10_UNET}
    write_json(tmp_path / "config.json", unet)
    write_json(tmp_path / "scheduler_config.json", CIFAR10_SCHEDULER)
    write_json(tmp_path / "model_index.json", CIFAR10_INDEX)
    config = UNet2DModel.load_config(tmp_path)
    torch.manual_seed(0)
    original = UNet2DModel.from_config(config)
    assert sum(parameter.numel() for parameter in original.parameters()) == 35_746_307, "as published"
    old_names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {}
    for name, tensor in original.state_dict().items():
        old = name
        if "attentions" in name:
            for new_part, old_part in old_names.items():
                old = old.replace(new_part, old_part)
        state[old] = tensor
    save_file(state, tmp_path / WEIGHTS, metadata={"format": "pt"})
    model = load_model(str(tmp_path))
    assert same_weights(model.denoiser, original)
    assert model.scheduler.config.variance_type == "fixed_large"
    assert (model.sampler.num_classes, model.notices) == (0, ())
    found = collect(model, samples_per_step=1, calibration_steps=2, num_inference_steps=2)
    assert found.groups[0].leaf("sample").shape == (2, 3, 32, 32)


def test_integers_are_no_weights(bare: Path) -> None:
    state = load_file(bare / WEIGHTS)
    save_file(
        state | {"conv_in.weight": (state["conv_in.weight"] * 50).int()}, bare / WEIGHTS, metadata={"format": "pt"}
    )
    with pytest.raises(ModelError, match=r"'conv_in\.weight' in .* is I32, which is no type of weights"):
        load_model(str(bare))


@dataclass
class Touch:
    """What a pickled file may hold: unpickling it runs code."""

    path: Path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("suffix", ["bin", "ckpt", "pt"])
def test_pickled_weights_are_refused_and_never_read(bare: Path, tmp_path: Path, suffix: str) -> None:
    mark, data = tmp_path / "was-run", pickle.dumps(Touch(tmp_path / "was-run"))
    pickle.loads(data)
    assert mark.exists(), "the file would run code"
    mark.unlink()
    (bare / WEIGHTS).unlink()
    (bare / f"diffusion_pytorch_model.{suffix}").write_bytes(data)
    with pytest.raises(ModelError, match=r"pickled.*never read"):
        load_model(str(bare))
    assert not mark.exists()


def test_the_hash_follows_weights_and_configuration_but_not_dtype_or_place(unet: UNet2DModel, bare: Path) -> None:
    model = load_model(str(bare))
    moved = shutil.copytree(bare, bare.parent / "moved")
    assert load_model(str(moved)).sha256 == model.sha256 == model_sha256(unet)
    assert load_model(str(bare), dtype=torch.bfloat16).sha256 == model.sha256
    with torch.no_grad():
        next(unet.parameters())[0].add_(1e-3)
    assert model_sha256(unet) != model.sha256
    other = UNet2DModel.from_config({**model.denoiser.config, "norm_eps": 1e-3})
    other.load_state_dict(model.denoiser.state_dict())
    assert model_sha256(other) != model.sha256


def test_loading_is_silent(bare: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load_model(str(bare), dtype=torch.bfloat16)
    load_model()
    assert capfd.readouterr() == ("", "")


def test_a_missing_folder_and_a_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"There is no folder '.*/absent'"):
        load_model(str(tmp_path / "absent"))
    (tmp_path / "model.ckpt").write_bytes(b"")
    with pytest.raises(ModelError, match="is a file"):
        load_model(str(tmp_path / "model.ckpt"))


def test_a_folder_without_a_denoiser_says_what_it_holds(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no denoiser"):
        load_model(str(tmp_path))
    write_json(tmp_path / "config.json", {"_class_name": "AutoencoderKL"})
    with pytest.raises(ModelError, match="is a AutoencoderKL, which takes no time step"):
        load_model(str(tmp_path))
    write_json(tmp_path / "config.json", {"_class_name": "os.system"})
    with pytest.raises(ModelError, match="takes no time step"):
        load_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read as JSON"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("name", ["StableCascadeUNet", "T5FilmDecoder"])
def test_a_denoiser_may_call_its_time_step_by_a_longer_name(tmp_path: Path, name: str) -> None:
    write_json(tmp_path / "config.json", {"_class_name": name})
    assert find_parts(tmp_path).denoiser == tmp_path
    write_json(tmp_path / "model_index.json", {"vae": ["diffusers", "AutoencoderKL"], "prior": ["diffusers", name]})
    assert find_parts(tmp_path).component == "prior"


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


def a_long_file(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 25)


@pytest.mark.parametrize(
    ("make", "said"), [(a_pipe, "it is not a regular file"), (a_long_file, "it has more than 16,777,216 bytes")]
)
def test_a_configuration_that_is_no_fair_file_is_not_read(
    unet: UNet2DModel, tmp_path: Path, make: Callable[[Path], None], said: str
) -> None:
    DDIMPipeline(unet=unet, scheduler=DDIMScheduler()).save_pretrained(tmp_path)
    (tmp_path / "unet" / "config.json").unlink()
    make(tmp_path / "unet" / "config.json")
    with pytest.raises(ModelError, match=rf"unet/config\.json' cannot be read as JSON \({said}\)"):
        load_model(str(tmp_path))


def test_the_name_of_a_pipeline_is_none() -> None:
    with pytest.raises(ModelError, match=r"str is no pipeline .* load_model\(\) reads folders"):
        from_pipeline("reference")


def test_a_pipeline_without_a_denoiser_says_so(tmp_path: Path) -> None:
    write_json(tmp_path / "model_index.json", {"_class_name": "X", "vae": ["diffusers", "AutoencoderKL"]})
    with pytest.raises(ModelError, match="no component that takes a time step"):
        load_model(str(tmp_path))


def test_a_component_that_does_not_exist_is_named(tmp_path: Path, unet: UNet2DModel) -> None:
    DDIMPipeline(unet=unet, scheduler=DDIMScheduler()).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="no denoiser named 'transformer'; it has unet"):
        load_model(str(tmp_path), component="transformer")


@pytest.mark.parametrize("keep", [0, 4, 1000, -1])
def test_truncated_weights_are_refused(bare: Path, keep: int) -> None:
    (bare / WEIGHTS).write_bytes((bare / WEIGHTS).read_bytes()[:keep])
    with pytest.raises(ModelError, match="truncated"):
        load_model(str(bare))


def test_missing_extra_and_misshapen_weights_are_refused(bare: Path) -> None:
    state = {name: tensor.clone() for name, tensor in load_file(bare / WEIGHTS).items()}
    first = "conv_in.bias"
    without = {name: tensor for name, tensor in state.items() if name != first}
    for altered, said in (
        (without, f"missing: {first}"),
        ({**state, "more": torch.zeros(1)}, "unexpected: more"),
        ({**state, first: torch.zeros(1)}, "cannot be loaded"),
    ):
        save_file(altered, bare / WEIGHTS, metadata={"format": "pt"})
        with pytest.raises(ModelError, match=said):
            load_model(str(bare))
    (bare / WEIGHTS).unlink()
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(str(bare))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_non_finite_weight_names_its_layer(unet: UNet2DModel, tmp_path: Path, value: float) -> None:
    with torch.no_grad():
        unet.down_blocks[1].resnets[0].conv2.weight[0, 0, 0, 0] = value
    unet.save_pretrained(tmp_path)
    with pytest.raises(NonFiniteError, match=r"down_blocks\.1\.resnets\.0\.conv2\.weight"):
        load_model(str(tmp_path))


def test_an_unknown_scheduler_is_refused(bare: Path) -> None:
    write_json(bare / "scheduler_config.json", {"_class_name": "NoSuchScheduler"})
    with pytest.raises(ModelError, match="NoSuchScheduler"):
        load_model(str(bare))


@pytest.mark.parametrize(
    "change", [{"block_out_channels": []}, {"time_embedding_type": "x"}, {"norm_num_groups": 0}, {"act_fn": [1]}]
)
def test_a_configuration_that_no_model_takes_is_one_sentence(bare: Path, change: dict[str, Any]) -> None:
    write_json(bare / "config.json", json.loads((bare / "config.json").read_text()) | change)
    with pytest.raises(ModelError, match=r"The UNet2DModel in '.*' cannot be loaded \(.*\); its files are"):
        load_model(str(bare))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"num_train_timesteps": -5}, r"cannot be (made|loaded) \(.+\); "),
        ({"num_train_timesteps": 10**12}, r"has 1,000,000,000,000 training steps, more than the 1,000,000 that"),
        ({"num_train_timesteps": 1_000_001}, r"has 1,000,001 training steps"),
    ],
)
@pytest.mark.parametrize("whole", [True, False])
def test_a_schedule_that_cannot_be_is_one_sentence(
    unet: UNet2DModel, tmp_path: Path, change: dict[str, Any], sentence: str, whole: bool
) -> None:
    DDIMPipeline(unet=unet, scheduler=DDIMScheduler()).save_pretrained(tmp_path)
    path = tmp_path / "scheduler" / "scheduler_config.json"
    write_json(path, json.loads(path.read_text()) | change)
    with pytest.raises(ModelError, match=sentence):
        load_model(str(tmp_path if whole else tmp_path / "unet"))


def test_a_model_without_timestep_is_refused() -> None:
    class Plain(nn.Module):
        def forward(self, sample: Tensor) -> Tensor:
            return sample

    with pytest.raises(ModelError, match=r"Plain.*time"):
        check_denoiser(Plain())


def test_class_embeddings_that_are_no_labels_are_refused(tmp_path: Path) -> None:
    UNet2DModel(
        block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
        class_embed_type="timestep",
    ).save_pretrained(tmp_path)  # fmt: skip
    with pytest.raises(ModelError, match="'timestep' take no class numbers"):
        load_model(str(tmp_path))


def test_an_unusable_device_is_a_usage_error_before_anything_is_read(bare: Path) -> None:
    next(bare.glob("*.safetensors")).unlink()
    with pytest.raises(ConfigError, match="'nonsense'"):
        load_model(str(bare), device="nonsense")


def test_what_means_no_class_is_none() -> None:
    with pytest.raises(ConfigError, match=r"from 0 to 9\. Got 10"):
        load_model("reference", classes=[10])


def test_another_scheduler_keeps_the_noise_schedule_of_the_model() -> None:
    model = load_model()
    other = with_scheduler(model, "EulerDiscreteScheduler")
    assert type(other.scheduler).__name__ == "EulerDiscreteScheduler"
    assert torch.equal(other.scheduler.alphas_cumprod, model.scheduler.alphas_cumprod)
    with pytest.raises(ConfigError, match="'UNet2DModel'"):
        with_scheduler(model, "UNet2DModel")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("SchedulerMixin", "no scheduler named 'SchedulerMixin'"),
        ("EDMEulerScheduler", "of different kinds.*save the pipeline with that scheduler"),
        ("FlowMatchEulerDiscreteScheduler", "of different kinds"),
    ],
)
def test_a_scheduler_that_does_not_fit_is_one_sentence(name: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        with_scheduler(load_model(), name)


def test_whatever_a_scheduler_raises_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise UnboundLocalError("betas")

    model = load_model()
    monkeypatch.setattr(DDIMScheduler, "from_config", fail)
    with pytest.raises(ConfigError, match=r"DDIMScheduler cannot be made from the model's own schedule \(betas\)"):
        with_scheduler(model, "DDIMScheduler")


def test_a_hub_id_without_the_hub_says_to_pass_a_folder(tmp_path: Path) -> None:
    """In a process of its own, because the hub's client reads HF_HUB_OFFLINE once, when it is imported."""
    script = (
        "from ptq_tdq.calib_data import load_model\nfrom ptq_tdq.errors import ModelError\n"
        "try:\n    load_model('google/ddpm-cifar10-32')\nexcept ModelError as error:\n    print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.count("\n") == 1, "one line"
    assert "'google/ddpm-cifar10-32' is no local folder and the hub could not be reached; pass the path" in done.stdout
