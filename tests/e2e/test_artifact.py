"""What is saved is what was calibrated, bit for bit; and it samples wherever the original did."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler
from torch import Tensor

from ptq_tdq import Calls, QuantizedModel, calibrate, collect, load_model, load_quantized, preset
from ptq_tdq.artifacts import read_artifact
from ptq_tdq.errors import ArtifactError, ConfigError, TimestepError

QUICK = {
    "weight_iterations": 2,
    "activation_iterations": 2,
    "batch_size": 4,
    "weight_range": "minmax",
    "activation_range": "minmax",
}
METHODS = ["static", "S_4", "tdq", "tdq-thin", "step-table", "step-lsq", "dynamic", "dynamic-statistics"]
CASES = [
    *((method, "conditional") for method in METHODS),
    ("tdq-thin", "pipeline"),
    ("dynamic-statistics-time", "pipeline"),
]
TIMES = [
    torch.tensor(0),
    torch.tensor(999),
    torch.tensor([0, 1, 500, 999]),
    torch.tensor([0.0, 0.5, 123.25, 998.75]),
    torch.tensor([750]),
    7,
]


def collected(folder: Path) -> tuple[Any, Calls]:
    model = load_model(str(folder))
    return model, collect(model, samples_per_step=3, calibration_steps=3, num_inference_steps=4)


def inputs(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return x, {"class_labels": torch.arange(4) % 3} if model.config.num_class_embeds else {}


def predict(model: QuantizedModel, t: Any) -> Tensor:
    x, labels = inputs(model)
    with torch.no_grad():
        result: Tensor = model(x, t, **labels).sample
    return result


@pytest.mark.parametrize(("method", "folder"), CASES)
def test_every_method_comes_back_bit_for_bit(
    method: str, folder: str, contents: Any, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    model, calls = collected(request.getfixturevalue(folder))
    before = model.denoiser.state_dict()
    in_memory = calibrate(model.denoiser, preset("default", method=method, **QUICK), calls)
    assert all(torch.equal(value, before[name]) for name, value in model.denoiser.state_dict().items())
    in_memory.save_pretrained(tmp_path / "first")
    loaded = load_quantized(tmp_path / "first")
    for t in TIMES:
        assert torch.equal(predict(loaded, t), predict(in_memory, t))
    assert not torch.equal(predict(loaded, 500), predict(model.denoiser, 500))
    loaded.save_pretrained(tmp_path / "second")
    assert contents(tmp_path / "first") == contents(tmp_path / "second")
    methods = {q.method for q in read_artifact(tmp_path / "first").quantizers if not q.name.startswith("conv_in")}
    assert methods == {method}


@pytest.mark.parametrize("name", ["paper", "qdiff"])
def test_the_presets_of_the_papers_run_end_to_end(
    name: str, cli: Any, small: tuple[str, ...], conditional: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    flags = ("--preset", name, "--method", "static", "--scheme", "W4A6")
    assert cli("calibrate", "--model", conditional, "--output-dir", out, *small, *flags, "-q").code == 0
    layers = {layer.name: layer for layer in read_artifact(out).layers}
    conv = layers["mid_block.resnets.0.conv1"]
    assert (conv.weight_bits, [q.bits for q in conv.inputs]) == (4, [6])
    assert layers["conv_in"].weight_bits == {"paper": 8, "qdiff": 4}[name]
    assert ("mid_block.attentions.0.products.0" in layers) == (name == "qdiff")
    assert ("up_blocks.0.resnets.0.conv_shortcut" in layers) == (name == "qdiff")
    assert "time_embedding.linear_1" in layers
    assert predict(load_quantized(out), 3).isfinite().all()


def test_batches_of_mixed_t_are_what_each_sample_gets_alone(calibrated: Any, conditional: Path) -> None:
    model = load_quantized(calibrated(conditional))
    x, labels = inputs(model)
    t = torch.tensor([0.0, 300.5, 301.0, 999.0])
    together, noise = predict(model, t), []
    for i in range(4):
        with torch.no_grad():
            alone = model(x[i : i + 1], t[i : i + 1], labels["class_labels"][i : i + 1]).sample
        noise.append(float((together[i : i + 1] - alone).pow(2).mean() / alone.pow(2).mean()))
    # sums in another order may put a value on the other side of a rounding tie; another t leaves ten times as much
    assert max(noise) < 1e-3 and sum(value < 1e-10 for value in noise) >= 3
    assert not torch.equal(together, predict(model, torch.full((4,), 300.5)))


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(
    cli: Any, small: tuple[str, ...], contents: Any, calibrated: Any, pipeline: Path, tmp_path: Path
) -> None:
    first = contents(calibrated(pipeline))
    assert cli("calibrate", "--model", pipeline, "--output-dir", tmp_path / "same", *small).code == 0
    assert contents(tmp_path / "same") == first
    other = (*small, "--seed", "1", "-q")
    assert cli("calibrate", "--model", pipeline, "--output-dir", tmp_path / "other", *other).code == 0
    changed = {name for name, data in contents(tmp_path / "other").items() if data != first[name]}
    assert changed == set(first)


@pytest.mark.parametrize(("cls", "scheduler"), [(DDPMPipeline, DDPMScheduler), (DDIMPipeline, DDIMScheduler)])
def test_diffusers_own_pipelines_sample_with_it(cls: type, scheduler: type, calibrated: Any, pipeline: Path) -> None:
    pipe = cls.from_pretrained(pipeline, scheduler=scheduler(), low_cpu_mem_usage=False)  # type: ignore[attr-defined]
    pipe.set_progress_bar_config(disable=True)

    def images() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        found = pipe(batch_size=2, num_inference_steps=7, generator=generator, output_type="np").images
        return torch.from_numpy(found)

    full = images()
    pipe.unet = load_quantized(calibrated(pipeline))
    quantized = images()
    assert quantized.shape == (2, 8, 8, 3) and quantized.isfinite().all()
    assert not torch.equal(quantized, full)


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("DDIMScheduler", 1),
        ("DDIMScheduler", 13),
        ("DDPMScheduler", 6),
        ("EulerDiscreteScheduler", 7),
        ("EulerAncestralDiscreteScheduler", 3),
        ("DPMSolverMultistepScheduler", 5),
        ("PNDMScheduler", 6),
        ("HeunDiscreteScheduler", 4),
    ],
)
def test_other_samplers_and_step_counts(
    name: str, steps: int, cli: Any, calibrated: Any, pipeline: Path, tmp_path: Path
) -> None:
    flags = ("--scheduler", name, "--num-inference-steps", steps, "--num-images", 2, "--threads", 1, "--json")
    result = cli("sample", calibrated(pipeline), "--output", tmp_path / "x.png", *flags)
    assert (result.code, result.err) == (0, "")


def test_the_fractional_steps_of_euler_reach_the_tables(calibrated: Any, pipeline: Path) -> None:
    model = load_quantized(calibrated(pipeline))
    scheduler = diffusers.EulerDiscreteScheduler(use_karras_sigmas=True)
    scheduler.set_timesteps(5)
    assert any(t != t.round() for t in scheduler.timesteps)
    for t in scheduler.timesteps:
        assert predict(model, t).isfinite().all()


@pytest.mark.parametrize("t", [-0.5, 1000.5, 1001, torch.tensor([0, 1, 2, 1001])])
def test_a_time_step_outside_the_tables_names_the_covered_range(t: Any, calibrated: Any, pipeline: Path) -> None:
    model = load_quantized(calibrated(pipeline))
    with pytest.raises(TimestepError, match="cover the time steps 0 to 1000"):
        predict(model, t)


def test_a_scheduler_with_more_training_steps_is_refused(
    cli: Any, calibrated: Any, pipeline: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(pipeline, tmp_path / "model"))
    DDPMScheduler(num_train_timesteps=4000).save_pretrained(model / "scheduler")
    result = cli("sample", calibrated(pipeline), "--model", model, "--output", tmp_path / "x.png", "--threads", 1)
    assert result.code == 1 and "cover the time steps 0 to 1000. Got t = " in result.err
    assert not (tmp_path / "x.png").exists()


def test_an_unknown_backend_and_a_missing_artifact(calibrated: Any, pipeline: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="simulated"):
        load_quantized(calibrated(pipeline), backend="fast")  # type: ignore[arg-type]
    with pytest.raises(ArtifactError, match="is not a directory"):
        load_quantized(tmp_path / "missing")
