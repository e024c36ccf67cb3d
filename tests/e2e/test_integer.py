"""The integer backend against the simulated one: the same codes, the same layers, and wherever the original sampled."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from torch import Tensor

from ptq_tdq import calibrate, collect, load_model, load_quantized, preset
from ptq_tdq.affine import quantize
from ptq_tdq.artifacts import read_artifact
from ptq_tdq.errors import ConfigError, ModelError, NonFiniteError, RuntimeUnsupportedError, TimestepError
from ptq_tdq.modules import ActivationQuantizer
from ptq_tdq.runtime import IntegerModel
from ptq_tdq.runtime.layer import IntegerLayer, WeightOnlyLayer
from ptq_tdq.runtime.step import Step

FEW = {"weight_iterations": 2, "activation_iterations": 2, "batch_size": 4}
CASES = {
    "default W4A8": {"preset": "default"},
    "affine 8-bit weights": {"preset": "qdiff", "scheme": "W8A6", "method": "S_4"},
    "no attention, whole tensors": {"preset": "paper", "scheme": "W2A4", "method": "tdq"},
    "dynamic": {"preset": "default", "scheme": "W5A8", "method": "dynamic"},
}
TIMES = [torch.tensor(500), torch.tensor([0, 999, 0, 17]), torch.tensor([0.5, 3.25, 998.75, 20.0])]


@pytest.fixture(scope="module", params=CASES)
def artifact(request: pytest.FixtureRequest, conditional: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    choices = dict(CASES[request.param])
    model = load_model(str(conditional))
    samples = collect(model, samples_per_step=2, calibration_steps=3, num_inference_steps=4)
    folder = tmp_path_factory.mktemp("integer") / "out"
    calibrate(model.unet, preset(choices.pop("preset"), **FEW, **choices), samples).save_pretrained(folder)
    return folder


def inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(4) % 3


def predict(model: Any, t: Any) -> Tensor:
    x, labels = inputs()
    with torch.no_grad():
        result: Tensor = model(x, t, class_labels=labels).sample
    return result


def simulated_codes(model: Any, t: Tensor) -> tuple[dict[str, Tensor], dict[str, tuple[Tensor, Tensor]]]:
    """Codes of all quantizers by name, and input and output of all layers, of one forward pass."""
    codes, layers = {}, {}

    def of_quantizer(module: ActivationQuantizer, args: tuple[Tensor], _: Tensor) -> None:
        x = args[0]
        scale, zero_point = (v.view(-1, *[1] * (x.ndim - 1)) for v in module.source(module.clock.read(len(x)), x))
        codes[module.record.name] = quantize(x, scale, zero_point, module.qtype)

    def of_layer(module: Any, args: tuple[Tensor], output: Tensor) -> None:
        layers[module.record.name] = args[0], output

    for quantizer in model.quantizers().values():
        quantizer.register_forward_hook(of_quantizer)
    for layer in model.layers().values():
        layer.register_forward_hook(of_layer)
    predict(model, t)
    return codes, layers


def integer_layers(model: IntegerModel) -> dict[str, IntegerLayer]:
    return {m.record.name: m for m in model.modules() if isinstance(m, IntegerLayer)}


def weight_only(model: IntegerModel) -> set[str]:
    return set(model.facts["weight_only_layers"])


@pytest.mark.parametrize("t", TIMES, ids=["one t", "mixed t", "fractional t"])
def test_each_layer_computes_what_the_simulated_one_does(artifact: Path, t: Tensor) -> None:
    codes, layers = simulated_codes(load_quantized(artifact), t)
    model = load_quantized(artifact, backend="integer")
    found = integer_layers(model)
    assert set(found) | weight_only(model) == set(layers)
    model.at(t)
    for name in weight_only(model) & {"conv_in", "time_embedding.linear_1"}:  # the others are fused into one
        layer, (x, expected) = model.get_submodule(f"model.{name}"), layers[name]
        assert isinstance(layer, WeightOnlyLayer) and layer.codes.dtype == torch.int8
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=2e-6 * float(expected.abs().max()))
    for name in found:
        x, expected = layers[name]
        found[name].norm = None  # the simulated layer's input is behind the norm
        mine: dict[str, Tensor] = {}
        record_codes(found[name], mine)
        torch.testing.assert_close(found[name](x), expected, rtol=1e-4, atol=2e-6 * float(expected.abs().max()))
        assert all(torch.equal(c.int(), like(c, codes[q])) for q, c in mine.items())


@pytest.mark.parametrize("t", TIMES, ids=["one t", "mixed t", "fractional t"])
def test_codes_differ_at_ties_and_what_follows_from_them_only(artifact: Path, t: Tensor) -> None:
    expected, _ = simulated_codes(load_quantized(artifact), t)
    model = load_quantized(artifact, backend="integer")
    found: dict[str, Tensor] = {}
    for layer in integer_layers(model).values():
        record_codes(layer, found)
    predict(model, t)
    differing = total = 0
    for name, codes in found.items():
        difference = (codes.int() - like(codes, expected[name])).abs()
        differing, total = differing + int(difference.sum()), total + difference.numel()
    # levels: a code on the other side of a tie changes what follows, by a little
    assert differing < 0.1 * total, f"{differing} of {total} codes differ"


def like(codes: Tensor, simulated: Tensor) -> Tensor:
    """Simulated codes in the form of integer ones: tokens [B, N, C] as pixels [B, C, 1, N]."""
    return simulated if simulated.ndim == 4 else simulated.movedim(-1, 1).reshape(codes.shape)


def record_codes(layer: IntegerLayer, found: dict[str, Tensor]) -> None:
    """Keep the codes of the layer's parts, without padding."""
    original = layer.quantize
    names = iter([part.quantizer.name for part in layer.parts])

    def recording(x: Tensor, grid: Any, *rest: Any) -> Tensor:
        codes = original(x, grid, *rest)
        top, left, bottom, right = grid.padding
        lo, hi = grid.channels
        found[next(names)] = codes[:, : hi - lo, top : codes.shape[2] - bottom, left : codes.shape[3] - right]
        return codes

    layer.quantize = recording


@pytest.mark.parametrize("t", [*TIMES, 7], ids=str)
def test_the_whole_model_predicts_the_same_noise(artifact: Path, t: Any) -> None:
    expected, found = (predict(load_quantized(artifact, backend=b), t) for b in ("simulated", "integer"))
    assert (found - expected).pow(2).mean() < 1e-4 * expected.pow(2).mean()


@pytest.mark.parametrize("t", [0.0, 250.75, 998.5, 999.0])
def test_one_time_step_for_all_samples_is_that_of_each(artifact: Path, t: float) -> None:
    model = load_quantized(artifact, backend="integer")
    alone, mixed = (predict(model, torch.tensor(each)) for each in (t, [t, t, t, 7.5]))
    assert torch.equal(alone[:3], mixed[:3]) and not torch.equal(alone[3], mixed[3])


def test_torch_operations_give_the_same_as_the_kernels(
    calibrated: Callable[[Path], Path], conditional: Path, tmp_path: Path
) -> None:
    artifact = calibrated(conditional)
    # in a process of its own: the library is opened once for each
    script = (
        "import sys, torch; from ptq_tdq import load_quantized; torch.set_num_threads(1)\n"
        "model = load_quantized(sys.argv[1], backend='integer'); assert 'torch' in model.facts['passes'], model.facts\n"
        "x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))\n"
        "with torch.no_grad(): y = model(x, torch.tensor(500), class_labels=torch.arange(4) % 3).sample\n"
        "torch.save(y, sys.argv[2])"
    )
    out = tmp_path / "y.pt"
    environment = os.environ | {"PTQ_TDQ_NATIVE": "0"}
    subprocess.run([sys.executable, "-c", script, str(artifact), str(out)], check=True, env=environment)
    expected = predict(load_quantized(artifact), torch.tensor(500))
    assert (torch.load(out) - expected).pow(2).mean() < 1e-4 * expected.pow(2).mean()


def test_it_is_a_drop_in_for_a_pipeline(calibrated: Callable[[Path], Path], pipeline: Path) -> None:
    folder = calibrated(pipeline)
    pictures = []
    original = load_model(str(pipeline)).unet
    for unet in (original, load_quantized(folder), load_quantized(folder, backend="integer")):
        pipe = DDIMPipeline(original, DDIMScheduler())
        pipe.unet = unet
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        pictures.append(pipe(2, generator, num_inference_steps=3, output_type="np").images)
    full, simulated, integer = pictures
    assert abs(simulated - integer).mean() < 0.2 * abs(simulated - full).mean()  # far below the loss of quantization


def test_copies_work_alone(calibrated: Callable[[Path], Path], conditional: Path) -> None:
    model = load_quantized(calibrated(conditional), backend="integer")
    before = predict(model, 500)
    twin = copy.deepcopy(model)
    predict(twin, 3)
    assert torch.equal(predict(model, 500), before) and torch.equal(predict(twin, 500), before)


def test_what_cannot_be_answered_is_refused(calibrated: Callable[[Path], Path], conditional: Path) -> None:
    folder = calibrated(conditional)
    model = load_quantized(folder, backend="integer")
    with pytest.raises(TimestepError, match="0 to 999"):
        predict(model, 1000)
    model.at(torch.tensor([1, 2]))
    with pytest.raises(ModelError, match="2 time steps do not fit a batch of 4"):
        last = integer_layers(model)["conv_out"]
        last(torch.zeros(4, last.parts[0].channels[1], 8, 8))
    with pytest.raises(NonFiniteError, match="NaN or Inf"):
        model(torch.full((1, 3, 8, 8), torch.nan), 1, class_labels=torch.tensor([0]))
    with pytest.raises(ConfigError, match="on the CPU only"):
        load_quantized(folder, backend="integer", device="meta")
    with pytest.raises(ConfigError, match="simulated, integer"):
        load_quantized(folder, backend="fast")  # type: ignore[call-overload]


def test_layers_without_an_integer_form_are_named(
    monkeypatch: pytest.MonkeyPatch, calibrated: Callable[[Path], Path], conditional: Path
) -> None:
    original = UNet2DModel.from_config

    def circular(config: Any) -> UNet2DModel:
        model = original(config)
        model.conv_in.padding_mode = "circular"
        return model

    monkeypatch.setattr(UNet2DModel, "from_config", circular)
    with pytest.raises(RuntimeUnsupportedError, match=r"conv_in \(Conv2d\) has no integer form"):
        load_quantized(calibrated(conditional), backend="integer")


def test_intervals_from_a_network_are_for_the_simulated_backend(
    calibrated: Callable[[Path], Path], conditional: Path
) -> None:
    artifact = read_artifact(calibrated(conditional))
    first = artifact.quantizers[0].name
    table = replace(artifact.tables[first], generator={"net.0.weight": torch.ones(1)})
    with pytest.raises(RuntimeUnsupportedError, match=rf"'{first}' .* network .* backend=\"simulated\""):
        Step(replace(artifact, tables={**artifact.tables, first: table}))


def test_inspect_says_what_runs(calibrated: Callable[[Path], Path], conditional: Path, cli: Any) -> None:
    result = cli("inspect", "--runtime", calibrated(conditional))
    assert result.code == 0, result.err
    assert "layers in integers (u8 x s8, int32 sums)" in result.out
    assert "time_embedding.linear_1" in result.out


VARIANTS = {
    "scale_shift": {"resnet_time_scale_shift": "scale_shift"},
    "sampling inside residual blocks": {"downsample_type": "resnet", "upsample_type": "resnet"},
    "another activation": {"act_fn": "gelu"},
    "attention, four heads, asymmetric padding": {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 4,
        "downsample_padding": 0,
    },
    "first layer left out": {},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_unets_of_other_forms(name: str, unet: Callable[..., UNet2DModel], tmp_path: Path) -> None:
    model = unet(**VARIANTS[name])
    model.save_pretrained(tmp_path / "model")
    DDIMScheduler().save_pretrained(tmp_path / "model")
    loaded = load_model(str(tmp_path / "model"))
    samples = collect(loaded, samples_per_step=2, calibration_steps=2, num_inference_steps=4)
    skip = ("conv_in", "*.resnets.0.conv1") if name == "first layer left out" else ()
    config = preset("default", rounding="nearest", activation_iterations=0, skip=skip)
    calibrate(loaded.unet, config, samples).save_pretrained(tmp_path / "out")
    x = samples.x[:3]
    with torch.no_grad():
        expected, found = (
            load_quantized(tmp_path / "out", backend=backend)(x, torch.tensor(400)).sample
            for backend in ("simulated", "integer")
        )
    assert (found - expected).pow(2).mean() < 1e-4 * expected.pow(2).mean()
