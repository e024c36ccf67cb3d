"""The integer backend against the simulated one: the same codes, the same layers, and wherever the original sampled."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from denoisers import DENOISERS, Denoiser, prediction
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ptq_tdq import calibrate, load_quantized, preset, record
from ptq_tdq.affine import quantize
from ptq_tdq.errors import ConfigError, ModelError, NonFiniteError, RuntimeUnsupportedError, TimestepError
from ptq_tdq.modules import ActivationQuantizer, QuantLayer, QuantProduct
from ptq_tdq.runtime import IntegerModel
from ptq_tdq.runtime.attention import IntegerProduct
from ptq_tdq.runtime.blocks import FusedAttention, FusedResnet
from ptq_tdq.runtime.layer import CodedLayer, IntegerLayer
from ptq_tdq.runtime.token_blocks import FusedTransformer
from ptq_tdq.timeaxis import at, present

FEW = {"weight_iterations": 2, "activation_iterations": 2, "batch_size": 4, "activation_range": "minmax"}
CASES = {
    "default W4A8": {"preset": "default"},
    "affine 8-bit weights": {"preset": "qdiff", "scheme": "W8A6", "method": "S_4"},
    "no attention, whole tensors": {"preset": "paper", "scheme": "W2A4", "method": "tdq"},
    "dynamic": {"preset": "default", "scheme": "W5A8", "method": "dynamic"},
}
TIMES = [torch.tensor(500), torch.tensor([0, 1000, 0, 17]), torch.tensor([0.5, 3.25, 998.75, 20.0])]
WITHIN = 1e-4  # of the mean square of what is compared


def make_unet(**changes: Any) -> UNet2DModel:
    torch.manual_seed(0)
    options = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
        "norm_num_groups": 4,
        "num_class_embeds": 3,
    }
    return UNet2DModel(**options | changes).eval().requires_grad_(False)


def arguments(t: Any) -> dict[str, Any]:
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return {"sample": x, "timestep": t, "class_labels": torch.arange(4) % 3}


def artifact_of(model: nn.Module, calls: list[dict[str, Any]], folder: Path, name: str, **choices: Any) -> Path:
    with torch.no_grad(), record(model, num_train_timesteps=1000) as recorded:
        for call in calls:
            model(**call)
    calibrate(model, preset(name, **FEW | choices), recorded).save_pretrained(folder)
    return folder


def artifact_of_unet(folder: Path, changes: dict[str, Any], name: str = "default", **choices: Any) -> Path:
    model = make_unet(**changes)
    given = [arguments(torch.full((4,), t)) for t in (999, 400, 10)]
    if model.config.num_class_embeds is None:
        given = [{name: value for name, value in call.items() if name != "class_labels"} for call in given]
    return artifact_of(model, given, folder, name, **choices)


@pytest.fixture(scope="module", params=CASES)
def artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    choices = dict(CASES[request.param])
    return artifact_of_unet(tmp_path_factory.mktemp("integer") / "out", {}, choices.pop("preset"), **choices)


@pytest.fixture(scope="module")
def common(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One artifact of the default choices."""
    return artifact_of_unet(tmp_path_factory.mktemp("common") / "out", {}, rounding="nearest")


def predict(model: Any, t: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(**arguments(t)).sample
    return result


@contextmanager
def watched(model: Any) -> Iterator[tuple[dict[str, list[Tensor]], list[tuple[str, Tensor, Any, Tensor]]]]:
    """Codes of all quantizers by name; and name, t, arguments and output of each layer and product that runs."""
    codes: dict[str, list[Tensor]] = {}
    calls: list[tuple[str, Tensor, Any, Tensor]] = []

    def of_quantizer(module: ActivationQuantizer, args: tuple[Tensor], _: Tensor) -> None:
        x = args[0]
        scale, zero_point = (v.view(-1, *[1] * (x.ndim - 1)) for v in module.source(present(len(x)), x))
        codes.setdefault(module.record.name, []).append(quantize(x, scale, zero_point, module.qtype))

    def of_layer(module: Any, args: Any, kwargs: dict[str, Any], output: Tensor) -> None:
        rows = len((*args, *kwargs.values())[0])
        # copies, since models write into what they have
        calls.append(
            (module.record.name, *tree_map_only(Tensor, Tensor.clone, (present(rows), (args, kwargs), output)))
        )

    handles = [quantizer.register_forward_hook(of_quantizer) for quantizer in model.quantizers().values()]
    for module in model.modules():
        if isinstance(module, QuantLayer | QuantProduct):
            handles.append(module.register_forward_hook(of_layer, with_kwargs=True))
    yield codes, calls
    for handle in handles:
        handle.remove()


def parts(model: IntegerModel) -> dict[str, nn.Module]:
    """Layers and products by the names of their records."""
    return {name: m for name, m in model.model.named_modules() if isinstance(m, CodedLayer | IntegerProduct)}


@contextmanager
def alone(part: nn.Module) -> Iterator[nn.Module]:
    """A layer without what is fused in front of it: the simulated one's input is behind that."""
    fused = vars(part).pop("forward", None)
    yield part
    if fused:
        vars(part)["forward"] = fused


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-6 * float(expected.abs().max()))


def part_blocks(model: nn.Module) -> None:
    """Blocks that are one call of C, which does not show their codes, call their layers instead."""
    for module in model.modules():
        fused = vars(module).get("forward")
        if isinstance(fused, FusedTransformer):
            del module.__dict__["forward"]
        elif isinstance(fused, FusedResnet | FusedAttention):
            fused.planned = None


def record_codes(layer: IntegerLayer, found: dict[str, Tensor]) -> None:
    """Keep the codes of the layer's parts, without padding, which a layer in one call of C does not show."""
    original = layer.quantize
    layer.parts = tuple(replace(part, native=None) for part in layer.parts)
    names = iter([part.quantizer.name for part in layer.parts])

    def recording(x: Tensor, grid: Any, *rest: Any) -> Tensor:
        codes = original(x, grid, *rest)
        top, left, bottom, right = grid.padding
        lo, hi = grid.channels
        found[next(names)] = codes[:, : hi - lo, top : codes.shape[2] - bottom, left : codes.shape[3] - right]
        return codes

    layer.quantize = recording


def like(codes: Tensor, simulated: Tensor) -> Tensor:
    """Simulated codes in the form of integer ones: tokens [B, N, C] as pixels [B, C, 1, N], or of one long row."""
    if simulated.ndim == 4:
        return simulated
    return simulated.reshape(len(codes), -1, simulated.shape[-1]).movedim(-1, 1).reshape(codes.shape)


@pytest.mark.parametrize("t", TIMES, ids=["one t", "mixed t", "fractional t"])
def test_each_layer_computes_what_the_simulated_one_does(artifact: Path, t: Tensor) -> None:
    simulated = load_quantized(artifact)
    with watched(simulated) as (codes, calls):
        predict(simulated, t)
    model = load_quantized(artifact, backend="integer")
    found = parts(model)
    assert set(found) == {name for name, *_ in calls}
    for name, rows, (args, kwargs), expected in calls:
        mine: dict[str, Tensor] = {}
        with at(rows), model.step.call(), alone(found[name]) as part:
            output = part(*args, **kwargs)
            if isinstance(part, IntegerLayer):
                record_codes(part, mine)
                close(part(*args, **kwargs), expected)
                assert mine
        if isinstance(part, CodedLayer):
            close(output, expected)
        else:
            assert (output - expected).pow(2).mean() < WITHIN * expected.pow(2).mean()  # ties behind the softmax
        assert all(torch.equal(c.int(), like(c, codes[q][0])) for q, c in mine.items())


@pytest.mark.parametrize("t", TIMES, ids=["one t", "mixed t", "fractional t"])
def test_codes_differ_at_ties_and_what_follows_from_them_only(artifact: Path, t: Tensor) -> None:
    simulated = load_quantized(artifact)
    with watched(simulated) as (expected, _):
        predict(simulated, t)
    model = load_quantized(artifact, backend="integer")
    found: dict[str, Tensor] = {}
    part_blocks(model)
    for layer in parts(model).values():
        if isinstance(layer, IntegerLayer):
            record_codes(layer, found)
    predict(model, t)
    differing = total = 0
    for name, codes in found.items():
        difference = (codes.int() - like(codes, expected[name][0])).abs()
        differing, total = differing + int(difference.sum()), total + difference.numel()
    # levels: a code on the other side of a tie changes what follows, by a little
    assert differing < 0.1 * total, f"{differing} of {total} codes differ"


@pytest.mark.parametrize("t", [*TIMES, 7], ids=str)
def test_the_whole_model_predicts_the_same_noise(artifact: Path, t: Any) -> None:
    expected, found = (predict(load_quantized(artifact, backend=b), t) for b in ("simulated", "integer"))
    assert (found - expected).pow(2).mean() < WITHIN * expected.pow(2).mean()


@pytest.mark.parametrize("t", [0.0, 250.75, 998.5, 1000.0])
def test_one_time_step_for_all_samples_is_that_of_each(artifact: Path, t: float) -> None:
    model = load_quantized(artifact, backend="integer")
    alone, mixed = (predict(model, torch.tensor(each)) for each in (t, [t, t, t, 7.5]))
    assert torch.equal(alone[:3], mixed[:3]) and not torch.equal(alone[3], mixed[3])


@pytest.fixture(scope="module")
def integer(common: Path) -> Any:
    return load_quantized(common, backend="integer")


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32, torch.float64, torch.bool, torch.complex64])
@pytest.mark.parametrize(
    "values", [7, 0, 1000, 1001, -1, 2.5, torch.nan, torch.inf, [], [3], [5, 900], [5, 2000], [[1], [2]]]
)
def test_the_time_of_a_call_is_that_of_its_axis(integer: Any, values: Any, dtype: torch.dtype) -> None:
    def found(t: Callable[[Any], torch.Tensor]) -> tuple[Any, ...]:
        try:
            return (t(value.clone()).tolist(), t(value).dtype)
        except TimestepError as error:
            return (str(error),)

    value = torch.tensor(values, dtype=torch.complex64)
    value = value.to(dtype) if dtype.is_complex else value.real.to(dtype)
    assert found(integer._t) == found(integer.axis.t)


# One for each way in which models of diffusers use their layers: cross attention, split shortcuts, volumes, sounds,
# joint and rotary attention, lists of samples, experts, grouped and transposed convolutions, linear attention, masks.
KINDS = [
    "UNet2DConditionModel (SDXL)",
    "UNet3DConditionModel",
    "UNet1DModel",
    "StableAudioDiTModel",
    "SD3Transformer2DModel",
    "FluxTransformer2DModel",
    "ZImageTransformer2DModel",
    "HiDreamImageTransformer2DModel",
    "SanaTransformer2DModel",
    "HunyuanVideoFramepackTransformer3DModel",
    "QwenImageTransformer2DModel",
    "Lumina2Transformer2DModel",
]
ONE_LEVEL: dict[str, dict[str, Any]] = {
    "UNet2DConditionModel (SDXL)": {
        "block_out_channels": (16,),
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("UpBlock2D",),
        "transformer_layers_per_block": 1,
    },
    "UNet3DConditionModel": {
        "block_out_channels": (16,),
        "down_block_types": ("CrossAttnDownBlock3D",),
        "up_block_types": ("UpBlock3D",),
    },
}


@pytest.mark.parametrize("denoiser", [d for d in DENOISERS if d.name in KINDS], ids=lambda d: d.name)
def test_each_layer_of_denoisers_of_every_kind(denoiser: Denoiser, tmp_path: Path) -> None:
    denoiser = replace(denoiser, config={**denoiser.config, **ONE_LEVEL.get(denoiser.name, {})})
    original = denoiser.build()
    given = [denoiser.inputs(2, torch.full((2,), t)) for t in (1000.0, 601.0, 201.0)]
    cheap = {"scheme": "W4A8", "method": "step-table", "activation_iterations": 0}
    cheap |= {"rounding": "nearest", "round_again": False, "weight_range": "minmax"}
    folder = artifact_of(original, given, tmp_path / "out", "default", **cheap)
    simulated, integer = load_quantized(folder), load_quantized(folder, backend="integer")
    assert integer.facts["integer_layers"] + len(integer.facts["weight_only_layers"]) == len(simulated.layers())
    found = parts(integer)
    for t in ([601.0, 601.0], [1000.0, 201.5]):
        call = denoiser.inputs(2, torch.tensor(t))
        with torch.no_grad():
            with watched(simulated) as (_, calls):
                expected = prediction(simulated(**call))
            exact, output = prediction(original(**call)), prediction(integer(**call))
        # far below the loss of quantization, also where a code on the other side of a tie changes all that follows
        assert (output - expected).pow(2).mean() < 0.3 * (expected - exact).pow(2).mean()
        assert output.dtype == torch.float32 and len(calls) >= len(found)
        for name, rows, (args, kwargs), expected in calls:
            with torch.no_grad(), at(rows), integer.step.call(), alone(found[name]) as part:
                difference = (part(*args, **kwargs) - expected).pow(2).mean()
            assert difference < WITHIN * expected.pow(2).mean(), name


def test_torch_operations_give_the_same_as_the_kernels(common: Path, tmp_path: Path) -> None:
    # in a process of its own: the library is opened once for each
    script = (
        "import sys, torch; from ptq_tdq import load_quantized\n"
        'model = load_quantized(sys.argv[1], backend="integer")\n'
        'assert "PTQ_TDQ_NATIVE=0" in model.facts["passes"] and "native" not in model.facts["products"], model.facts\n'
        "x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))\n"
        "with torch.no_grad(): y = model(x, torch.tensor(500), class_labels=torch.arange(4) % 3).sample\n"
        "torch.save(y, sys.argv[2])"
    )
    out = tmp_path / "y.pt"
    environment = os.environ | {"PTQ_TDQ_NATIVE": "0"}
    subprocess.run([sys.executable, "-c", script, str(common), str(out)], check=True, env=environment)
    expected = predict(load_quantized(common), torch.tensor(500))
    assert (torch.load(out) - expected).pow(2).mean() < WITHIN * expected.pow(2).mean()


def test_it_is_a_drop_in_for_a_pipeline(tmp_path: Path) -> None:
    folder = artifact_of_unet(tmp_path / "out", {"num_class_embeds": None}, rounding="nearest")
    original = make_unet(num_class_embeds=None)
    pictures = []
    for unet in (original, load_quantized(folder), load_quantized(folder, backend="integer")):
        pipe = DDIMPipeline(original, DDIMScheduler())
        pipe.unet = unet
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        pictures.append(pipe(2, generator, num_inference_steps=3, output_type="np").images)
    full, simulated, integer = pictures
    assert abs(simulated - integer).mean() < 0.2 * abs(simulated - full).mean()  # far below the loss of quantization


def test_copies_work_alone(common: Path) -> None:
    model = load_quantized(common, backend="integer")
    before = predict(model, 500)
    twin = copy.deepcopy(model)
    predict(twin, 3)
    assert torch.equal(predict(model, 500), before) and torch.equal(predict(twin, 500), before)
    del model
    assert torch.equal(predict(twin, 500), before)
    with pytest.raises(ModelError, match="not pickled"):
        pickle.dumps(twin)


def test_what_cannot_be_answered_is_refused(common: Path) -> None:
    model = load_quantized(common, backend="integer")
    with pytest.raises(TimestepError, match="0 to 1000"):
        predict(model, 1001)
    with pytest.raises(ModelError, match="3 time steps do not fit a batch of 4"), at(torch.tensor([1.0, 2.0, 3.0])):
        model.model(**arguments(2))
    x = torch.zeros(1, 3, 8, 8)
    for wrong in (torch.nan, torch.inf):
        with pytest.raises(NonFiniteError, match="NaN or Inf"):
            model(x + wrong, 1, class_labels=torch.tensor([0]))
    with pytest.raises(ModelError, match="at least one sample"):
        model(x[:0], 1, class_labels=torch.tensor([0]))
    with pytest.raises(ModelError, match="on meta"):
        model(x.to("meta"), 1, class_labels=torch.tensor([0]))
    for moved in (torch.float16, "meta"):
        with pytest.raises(RuntimeUnsupportedError, match="float32 on the CPU"):
            model.to(moved)
    with pytest.raises(ConfigError, match="simulated, integer"):
        load_quantized(common, backend="fast")  # type: ignore[call-overload]


def test_after_an_error_it_answers_as_before(common: Path) -> None:
    model = load_quantized(common, backend="integer")
    before = predict(model, 500)
    with pytest.raises(ValueError, match="class_labels"):
        model(torch.zeros(1, 3, 8, 8), 3)
    with pytest.raises(ModelError, match="call the model, not its parts"):
        model.model.conv_out(torch.zeros(1, 8, 8, 8))
    assert torch.equal(predict(model, 500), before)


def test_inspect_says_what_runs(common: Path, cli: Any) -> None:
    result = cli("inspect", "--runtime", common)
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
def test_unets_of_other_forms(name: str, tmp_path: Path) -> None:
    skip = ("conv_in", "*.resnets.0.conv1") if name == "first layer left out" else ()
    choices = {"rounding": "nearest", "activation_iterations": 0, "skip": skip}
    folder = artifact_of_unet(tmp_path / "out", VARIANTS[name], **choices)
    expected, found = (predict(load_quantized(folder, backend=b), torch.tensor(400)) for b in ("simulated", "integer"))
    assert (found - expected).pow(2).mean() < WITHIN * expected.pow(2).mean()
