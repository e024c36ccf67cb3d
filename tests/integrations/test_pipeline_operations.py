"""What pipelines do to a denoiser works on a quantized one, or ends in one sentence that says what to do.

Offloading is run with the CPU as the device to load onto: parameters travel to the meta device and back as they would
to and from an accelerator.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from calibrated import QUICK, Calibrated, load
from diffusers import (
    ControlNetModel,
    ControlNetXSAdapter,
    FirstBlockCacheConfig,
    KandinskyV22CombinedPipeline,
    PipelineQuantizationConfig,
    StableDiffusionControlNetPipeline,
    StableDiffusionControlNetXSPipeline,
)
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from pipelines import kandinsky
from recorded import calls_of
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ptq_tdq import QuantizedModel, calibrate, load_quantized, record
from ptq_tdq.calib_data import first_call, from_pipeline
from ptq_tdq.errors import ModelError, RuntimeUnsupportedError
from ptq_tdq.evaluate.metrics import sqnr_db
from ptq_tdq.integrations.diffusers import PtqTdqConfig, as_diffusers
from ptq_tdq.modules import QuantLayer
from ptq_tdq.plan import make_plan


@pytest.fixture(params=["a module of ours", "diffusers' own class"])
def pipe(request: pytest.FixtureRequest, stable_diffusion: Calibrated) -> Any:
    pipe = stable_diffusion.quantized()
    if request.param != "a module of ours":
        pipe.unet = as_diffusers(pipe.unet)
    return pipe


@pytest.fixture
def native(stable_diffusion: Calibrated) -> Any:
    """The pipeline with the quantized model as diffusers' own class."""
    pipe = stable_diffusion.quantized()
    pipe.unet = as_diffusers(pipe.unet)
    return pipe


def test_offloading_whole_models(pipe: Any, stable_diffusion: Calibrated) -> None:
    pipe.enable_model_cpu_offload(device="cpu")
    assert torch.equal(stable_diffusion.draw(pipe), stable_diffusion.drawn)


def test_offloading_layer_by_layer(pipe: Any, stable_diffusion: Calibrated) -> None:
    cpu_offload(pipe.unet, "cpu")  # what enable_sequential_cpu_offload calls
    assert all(parameter.is_meta for parameter in pipe.unet.parameters())
    assert torch.equal(stable_diffusion.draw(pipe), stable_diffusion.drawn)


@pytest.mark.parametrize(
    "kind", [{"offload_type": "leaf_level"}, {"offload_type": "block_level", "num_blocks_per_group": 1}]
)
def test_offloading_groups(kind: dict[str, Any], pipe: Any, stable_diffusion: Calibrated) -> None:
    pipe.unet.enable_group_offload(onload_device=torch.device("cpu"), **kind)
    assert torch.equal(stable_diffusion.draw(pipe), stable_diffusion.drawn)


@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
def test_offloading_groups_to_the_disk(kind: str, pipe: Any, stable_diffusion: Calibrated, tmp_path: Path) -> None:
    size = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    pipe.unet.enable_group_offload(
        onload_device=torch.device("cpu"), offload_type=kind, offload_to_disk_path=str(tmp_path), **size
    )
    assert any(tmp_path.iterdir())
    assert torch.equal(stable_diffusion.draw(pipe), stable_diffusion.drawn)


def test_half_precision_keeps_intervals_and_scales(stable_diffusion: Calibrated, tmp_path: Path) -> None:
    pipe = stable_diffusion.quantized().to(torch.bfloat16)
    before, after = load_quantized(stable_diffusion.artifact).to_artifact(), pipe.unet.to_artifact()
    assert all(torch.equal(table.scale, after.tables[name].scale) for name, table in before.tables.items())
    assert all(torch.equal(scale, after.weight_scale[name]) for name, scale in before.weight_scale.items())
    drawn = stable_diffusion.draw(pipe)
    assert drawn.dtype == torch.bfloat16 and sqnr_db(stable_diffusion.drawn, drawn.float()) > 25
    pipe.unet.save_pretrained(tmp_path / "half")
    pipe.unet = load_quantized(tmp_path / "half")
    assert torch.equal(stable_diffusion.draw(pipe), drawn)


def test_attention_slicing_is_refused_until_it_is_switched_off(pipe: Any, stable_diffusion: Calibrated) -> None:
    pipe.enable_attention_slicing()
    with pytest.raises(ModelError, match="disable_attention_slicing"):
        stable_diffusion.draw(pipe)
    pipe.disable_attention_slicing()
    assert torch.equal(stable_diffusion.draw(pipe), stable_diffusion.drawn)


def test_a_callback_at_the_end_of_each_step(pipe: Any, stable_diffusion: Calibrated) -> None:
    seen = []

    def callback(pipe: Any, step: int, t: Tensor, given: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append((step, given["latents"].shape))
        return {"latents": given["latents"] / 2}

    drawn = stable_diffusion.draw(pipe, callback_on_step_end=callback)
    assert len(seen) > 1 and not torch.equal(drawn, stable_diffusion.drawn)


def test_the_extra_arguments_of_a_control_net(pipe: Any, stable_diffusion: Calibrated) -> None:
    full = stable_diffusion.pipe()
    torch.manual_seed(0)
    net = ControlNetModel.from_unet(full.unet, conditioning_embedding_out_channels=(16, 32)).eval()
    for parameter in net.parameters():
        if not bool(parameter.any()):  # its outputs start at zero
            nn.init.normal_(parameter, std=0.05)
    image, drawn = torch.rand(1, 3, 16, 16), []
    for each in (full, pipe):
        components = {key: value for key, value in each.components.items() if key != "image_encoder"}
        controlled = StableDiffusionControlNetPipeline(**components, controlnet=net, requires_safety_checker=False)
        controlled.set_progress_bar_config(disable=True)
        drawn.append(stable_diffusion.draw(controlled, image=image))
    assert sqnr_db(stable_diffusion.drawn, drawn[0]) < 25 < sqnr_db(*drawn)


def test_a_control_net_takes_the_original_s_place_as_diffusers_own_class(stable_diffusion: Calibrated) -> None:
    full = stable_diffusion.pipe()
    net = ControlNetModel.from_unet(full.unet, conditioning_embedding_out_channels=(16, 32)).eval()
    components = {key: value for key, value in full.components.items() if key != "image_encoder"}
    pipe = StableDiffusionControlNetPipeline(**components, controlnet=net, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, 16, 16)
    with record(net) as calls:
        drawn = stable_diffusion.draw(pipe, image=image)
    pipe.controlnet = as_diffusers(calibrate(net, QUICK, calls))  # pipelines ask for the class
    assert sqnr_db(drawn, stable_diffusion.draw(pipe, image=image)) > 25


def test_control_net_xs_takes_diffusers_own_class(stable_diffusion: Calibrated) -> None:
    full = stable_diffusion.pipe()
    layers = {"layers_per_block": 2, "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}
    unet = type(full.unet).from_config(full.unet.config, **layers).eval()
    net = ControlNetXSAdapter.from_unet(unet, size_ratio=0.5, conditioning_embedding_out_channels=(16, 32)).eval()
    components = {key: value for key, value in full.components.items() if key != "image_encoder"} | {"unet": unet}
    pipe = StableDiffusionControlNetXSPipeline(**components, controlnet=net, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, 16, 16)
    with record(pipe.unet) as calls:
        drawn = stable_diffusion.draw(pipe, image=image)
    pipe.unet = as_diffusers(calibrate(pipe.unet, QUICK, calls))
    assert sqnr_db(drawn, stable_diffusion.draw(pipe, image=image)) > 20


@pytest.mark.filterwarnings("ignore:`callback_steps` is deprecated")
def test_a_combined_pipeline_runs_what_the_pipelines_in_it_hold(tmp_path: Path) -> None:
    torch.manual_seed(0)
    pipe = KandinskyV22CombinedPipeline(**kandinsky())
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(tmp_path / "full")
    call = {"height": 64, "width": 64, "prior_num_inference_steps": 2}

    def draw(pipe: Any) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        given = {"num_inference_steps": 2, "output_type": "np", "return_dict": False}
        return torch.as_tensor(pipe("A red fox", generator=generator, **call, **given)[0])

    full = draw(pipe)
    quantized = calibrate(pipe, QUICK, component="unet", call=call)
    quantized.save_pretrained(tmp_path / "out")
    pipe.unet = quantized
    assert torch.equal(draw(pipe), full)
    pipe.decoder_pipe.unet = quantized
    drawn = draw(pipe)
    assert 20 < sqnr_db(full, drawn) < 60
    config = PipelineQuantizationConfig(quant_mapping={"unet": PtqTdqConfig(tmp_path / "out")})
    assert torch.equal(draw(load(tmp_path / "full", quantization_config=config)), drawn)
    assert torch.equal(draw(load(tmp_path / "full", unet=as_diffusers(quantized))), drawn)


def test_an_image_prompt_beside_the_text(pipe: Any, stable_diffusion: Calibrated) -> None:
    full, integer, drawn = stable_diffusion.pipe(), stable_diffusion.pipe(), []
    integer.unet = load_quantized(stable_diffusion.artifact, backend="integer")
    generator = torch.Generator().manual_seed(0)
    weights = image_prompt(full.unet, generator)
    embeds = [torch.randn(2, 1, 16, generator=generator)]
    for each in (full, pipe, integer):
        each.unet._load_ip_adapter_weights([weights])
        drawn.append(stable_diffusion.draw(each, ip_adapter_image_embeds=embeds))
    assert sqnr_db(stable_diffusion.drawn, drawn[0]) < 20
    assert all(sqnr_db(drawn[0], quantized) > 20 for quantized in drawn[1:])


def image_prompt(unet: nn.Module, generator: torch.Generator) -> dict[str, dict[str, Tensor]]:
    """Random weights of an IP-adapter, by the keys of its file."""

    def random(*shape: int) -> Tensor:
        return 0.3 * torch.randn(shape, generator=generator)

    keys = [name.replace(".processor", ".to_k") for name in unet.attn_processors if name.endswith("attn2.processor")]
    shapes = [unet.get_submodule(key).weight.shape for key in keys]
    layers = {f"{2 * i + 1}.to_{kind}_ip.weight": random(*shape) for i, shape in enumerate(shapes) for kind in "kv"}
    projection = {"proj.weight": random(64, 16), "proj.bias": torch.zeros(64)}
    norm = {"norm.weight": torch.ones(16), "norm.bias": torch.zeros(16)}
    return {"image_proj": projection | norm, "ip_adapter": layers}


def lora(unet: nn.Module) -> dict[str, Tensor]:
    """Random low-rank weights beside queries, values and one convolution, by the keys of a file."""
    generator, found = torch.Generator().manual_seed(0), {}
    for name, module in unet.named_modules():
        if name.endswith(("to_q", "to_v", "resnets.0.conv1")):
            outputs, inputs, *sizes = module.weight.shape
            shapes = {"A": (4, inputs, *sizes), "B": (outputs, 4, *(1 for _ in sizes))}
            for side, shape in shapes.items():
                found[f"unet.{name}.lora_{side}.weight"] = 0.2 * torch.randn(shape, generator=generator)
    return found


def test_a_lora_beside_quantized_layers(native: Any, stable_diffusion: Calibrated, tmp_path: Path) -> None:
    full = stable_diffusion.pipe()
    weights = lora(full.unet)
    full.load_lora_weights(dict(weights))
    native.load_lora_weights(dict(weights))
    expected, drawn = stable_diffusion.draw(full), stable_diffusion.draw(native)
    assert sqnr_db(stable_diffusion.drawn, expected) < 20 < sqnr_db(expected, drawn)
    with pytest.raises(ModelError, match="fuse it into the full-precision pipeline"):
        native.fuse_lora(components=["unet"])
    with pytest.raises(ModelError, match="unload them"):
        native.save_pretrained(tmp_path)
    native.disable_lora()
    assert torch.equal(stable_diffusion.draw(native), stable_diffusion.drawn)
    native.unload_lora_weights()
    assert torch.equal(stable_diffusion.draw(native), stable_diffusion.drawn)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")  # PEFT's word on several adapters
def test_a_pipeline_that_looks_at_the_shapes_of_weights_loads_several_loras(
    calibrated: Callable[[str], Calibrated],
) -> None:
    flux = calibrated("FluxPipeline")
    full, native = flux.pipe(), flux.quantized()
    native.transformer = as_diffusers(native.transformer)
    weights = {f"transformer.{key[5:]}": 2 * value for key, value in lora(full.transformer).items()}
    for pipe in (full, native):
        for name in ("one", "two"):
            pipe.load_lora_weights(dict(weights), adapter_name=name)
        pipe.set_adapters(["one", "two"])
    expected, drawn = flux.draw(full), flux.draw(native)
    assert sqnr_db(flux.drawn, expected) + 3 < sqnr_db(expected, drawn)
    native.unload_lora_weights()
    assert torch.equal(flux.draw(native), flux.drawn)


@pytest.mark.parametrize("modules", [["to_q"], "all-linear", r".*(attn1|attn2).*to_[qkv].*"])
def test_a_new_adapter_goes_beside_quantized_layers(
    modules: Any, native: Any, stable_diffusion: Calibrated, tmp_path: Path
) -> None:
    names, full = list(native.unet.state_dict()), stable_diffusion.pipe().unet
    for unet in (native.unet, full):
        unet.add_adapter(LoraConfig(r=4, target_modules=modules, init_lora_weights=False))
        unet.save_lora_adapter(tmp_path / type(unet).__module__)
    adapted, expected = ({n for n, m in u.named_modules() if isinstance(m, LoraLayer)} for u in (native.unet, full))
    assert adapted == expected
    assert not torch.equal(stable_diffusion.draw(native), stable_diffusion.drawn)
    native.unet.disable_adapters()
    assert torch.equal(stable_diffusion.draw(native), stable_diffusion.drawn)
    native.unet.unload_lora()
    assert list(native.unet.state_dict()) == names


def test_a_state_dict_is_copied_and_written_as_any_other(native: Any, tmp_path: Path) -> None:
    state = native.unet.state_dict()
    torch.save(state, tmp_path / "state.pt")
    for other in (copy.deepcopy(state), copy.copy(state), state.copy(), torch.load(tmp_path / "state.pt")):
        assert list(other) == list(state) and all(torch.equal(other[key], value) for key, value in state.items())


def test_projections_are_fused_before_calibration(native: Any, stable_diffusion: Calibrated) -> None:
    """A fused layer would be one that nothing has calibrated."""
    for backend in ("simulated", "integer"):
        pipe = stable_diffusion.pipe()
        pipe.unet = load_quantized(stable_diffusion.artifact, backend=backend)
        with pytest.raises(ModelError, match="calibrate that"):
            pipe.fuse_qkv_projections()
    with pytest.raises(ModelError, match="calibrate that"):
        native.fuse_qkv_projections()
    assert torch.equal(stable_diffusion.draw(native), stable_diffusion.drawn)


def test_a_lora_on_a_module_of_ours_says_how(stable_diffusion: Calibrated) -> None:
    pipe = stable_diffusion.quantized()
    for add in (pipe.load_lora_weights, pipe.unet.add_adapter):
        with pytest.raises(ModelError, match="as_diffusers"):
            add(lora(stable_diffusion.pipe().unet))


def test_its_own_dtype_is_asked_for_in_any_way(native: Any) -> None:
    native.to(torch.float32)
    for unet in (native.unet.to("cpu", torch.float32), native.unet.to(torch.float32)):
        assert unet.dtype == torch.float32
    with pytest.raises(ValueError, match="Casting a quantized model"):
        native.unet.to(torch.bfloat16)


def test_a_lora_is_fused_before_calibration(stable_diffusion: Calibrated) -> None:
    pipe = stable_diffusion.pipe()
    pipe.load_lora_weights(lora(pipe.unet))
    with pytest.raises(ModelError, match=r"fuse them first \(pipe.fuse_lora\(\)"):
        calibrate(pipe, QUICK, prompts=["A red fox"])
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    fused = from_pipeline(pipe, prompts=["A red fox"], call={"height": 16, "width": 16})
    plan = make_plan(fused.denoiser, QUICK, first_call(fused, num_inference_steps=2, seed=0))
    names = [record.name for record in load_quantized(stable_diffusion.artifact).plan]
    assert [record.name for record in plan.layers] == names


class Small(nn.Module):
    """A denoiser of two layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.out = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 3)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        y = self.conv(sample).tanh().flatten(2).mT + timestep.float()[:, None, None] / 1000
        result: Tensor = self.out(y).mT.unflatten(2, sample.shape[2:])
        return result


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own tracing
@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace")  # C functions, around which the graph breaks
def test_a_compiled_model_computes_the_same(tmp_path: Path) -> None:
    model, generator = Small(), torch.Generator().manual_seed(0)
    given = {"sample": torch.randn(4, 3, 4, 4, generator=generator), "timestep": torch.tensor([900, 600, 300, 0])}
    later = given | {"timestep": torch.tensor([800, 500, 200, 100])}
    quantized: QuantizedModel = calibrate(model, QUICK, calls_of(model, **given, num_train_timesteps=1000))
    quantized.save_pretrained(tmp_path / "out")
    for each in (quantized, load_quantized(tmp_path / "out", model=Small(), backend="integer")):
        with torch.no_grad():
            expected, compiled = each(**given), torch.compile(each, backend="eager")
            assert torch.equal(compiled(**given), expected)
            assert torch.equal(compiled(**later), each(**later)) and not torch.equal(compiled(**later), expected)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace")
@pytest.mark.parametrize("kind", ["a module of ours", "diffusers' own class", "integers"])
def test_compiled_blocks_with_attention_compute_the_same(kind: str, calibrated: Callable[[str], Calibrated]) -> None:
    flux = calibrated("FluxPipeline")
    pipe = flux.pipe()
    pipe.transformer = load_quantized(flux.artifact, backend="integer" if kind == "integers" else "simulated")
    pipe.transformer = as_diffusers(pipe.transformer) if kind == "diffusers' own class" else pipe.transformer
    expected = flux.draw(pipe)
    pipe.transformer.compile_repeated_blocks(backend="eager")
    assert torch.equal(flux.draw(pipe), expected)


def test_a_pipeline_with_a_compiled_denoiser_is_calibrated_as_without(stable_diffusion: Calibrated) -> None:
    pipe = stable_diffusion.pipe()
    call = {"height": 16, "width": 16}
    expected = calibrate(pipe, QUICK, call=call)
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    found = calibrate(pipe, QUICK, call=call)
    assert found.provenance["calibration_set"] == expected.provenance["calibration_set"]
    state = expected.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in found.state_dict().items())


class Wrapped(Tensor):
    """As torchao's, and as those of a model in parts."""


def given_tensors_of_a_class(model: Any) -> None:
    layer = model.proj_out
    layer.weight = torch.nn.Parameter(layer.weight.detach().as_subclass(Wrapped), requires_grad=False)


HOOKS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "cache": (lambda model: model.enable_cache(FirstBlockCacheConfig(threshold=0.1)), r"hooks of diffusers \('fbc_"),
    "cast": (lambda model: model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32), "'layerwise_casting'"),
    "groups": (
        lambda model: model.enable_group_offload(torch.device("cpu"), offload_type="leaf_level"),
        r"'group_offloading'.* comes after calibration\. Take them off",
    ),
    "offload": (lambda model: cpu_offload(model, "cpu"), "no values here; load them, or calibrate before"),
    "float8": (lambda model: model.to(torch.float8_e4m3fn), "is float8_e4m3fn, in which nothing is computed"),
    "subclass": (given_tensors_of_a_class, "is a Wrapped, a tensor that is quantized already, or in parts; pass"),
}


@pytest.mark.parametrize("kind", HOOKS)
def test_what_runs_models_in_other_ways_comes_after_calibration(
    kind: str, calibrated: Callable[[str], Calibrated]
) -> None:
    pipe = calibrated("FluxPipeline").pipe()
    change, said = HOOKS[kind]
    change(pipe.transformer)
    with pytest.raises(ModelError, match=said):
        calibrate(pipe, QUICK, call={"height": 16, "width": 16})


def test_a_cache_that_was_switched_off_leaves_nothing(calibrated: Callable[[str], Calibrated]) -> None:
    pipe = calibrated("FluxPipeline").pipe()
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    pipe.transformer.disable_cache()
    call = {"height": 16, "width": 16, "max_sequence_length": 64}
    assert len(first_call(from_pipeline(pipe, call=call), num_inference_steps=2)) == 1


def test_integers_are_saved_as_the_artifact_that_they_came_from(stable_diffusion: Calibrated, tmp_path: Path) -> None:
    integer = load_quantized(stable_diffusion.artifact, backend="integer")
    for save in (integer.save_pretrained, integer.push_to_hub):
        with pytest.raises(ModelError, match="keep the artifact"):
            save(tmp_path / "unet")


def arguments_of(pipe: Any) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "sample": torch.randn(2, 4, 8, 8, generator=generator),
        "timestep": torch.tensor([601, 20]),
        "encoder_hidden_states": torch.randn(2, 7, pipe.unet.config.cross_attention_dim, generator=generator),
    }


def test_gradients_that_are_computed_again_are_those_of_the_call_s_time_steps(pipe: Any) -> None:
    given = arguments_of(pipe)

    def gradient() -> Tensor:
        x = given["sample"].clone().requires_grad_()
        pipe.unet.train()
        pipe.unet(**given | {"sample": x}).sample.square().sum().backward()
        assert x.grad is not None
        return x.grad

    plain = gradient()
    pipe.unet.enable_gradient_checkpointing()
    assert torch.equal(gradient(), plain)
    seen: list[Any] = []

    def own(module: Any, *args: Any) -> Any:
        seen.append(module)
        return checkpoint(module, *args, use_reentrant=False)

    pipe.unet.enable_gradient_checkpointing(own)
    assert torch.equal(gradient(), plain) and seen


def test_a_child_that_is_replaced_takes_part(stable_diffusion: Calibrated) -> None:
    pipe = stable_diffusion.quantized()
    integer = load_quantized(stable_diffusion.artifact, backend="integer")
    given = arguments_of(pipe)
    before = integer(**given).sample
    for unet in (pipe.unet, integer, copy.copy(integer)):
        unet.conv_act = nn.ReLU()
        assert unet.model.conv_act is unet.conv_act
    with torch.no_grad():
        found = pipe.unet(**given).sample
    assert sqnr_db(found, before) < 20 < sqnr_db(found, integer(**given).sample)


def test_hooks_at_the_end_of_an_integer_model(stable_diffusion: Calibrated) -> None:
    pipe = stable_diffusion.quantized()
    integer = load_quantized(stable_diffusion.artifact, backend="integer")
    given, seen = arguments_of(pipe), []

    def scaled(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        seen.append(output)
        return 0.5 * output

    for unet in (pipe.unet, integer, copy.deepcopy(integer)):
        handle = unet.conv_norm_out.register_forward_hook(scaled)
        with torch.no_grad():
            seen.append(unet(**given).sample)
            handle.remove()
            seen.append(unet(**given).sample)
    for other in (3, 6):
        for expected, found in zip(seen[:3], seen[other:], strict=False):
            assert sqnr_db(expected, found) > 25


@pytest.mark.parametrize("name", ["conv_norm_out", "conv_act", "conv_out", "time_proj"])
def test_a_forward_of_the_users_own_in_an_integer_model(name: str, stable_diffusion: Calibrated) -> None:
    pipe, found = stable_diffusion.quantized(), []
    for unet in (pipe.unet, load_quantized(stable_diffusion.artifact, backend="integer")):
        given, module = arguments_of(pipe), getattr(unet, name)
        module.forward = lambda x, own=module.forward: own(x) * 0.5
        with torch.no_grad():
            found.append(unet(**given).sample)
    assert sqnr_db(*found) > 25


def test_what_somebody_writes_to_is_not_remembered(stable_diffusion: Calibrated) -> None:
    """Time embeddings are, across calls and models."""
    pipe = stable_diffusion.quantized()
    one, other = (load_quantized(stable_diffusion.artifact, backend="integer") for _ in range(2))
    given = arguments_of(pipe)
    with torch.no_grad():
        expected = one(**given).sample
        handle = one.time_proj.register_forward_hook(lambda module, args, output: output.mul_(0.5))
        halved = [one(**given).sample for _ in range(2)]
        handle.remove()
        found = [model(**given).sample for model in (one, other)]
        one.time_proj.scale = 0.5
        scaled = one(**given).sample
    assert torch.equal(*halved)
    assert not torch.equal(halved[0], expected)
    assert not torch.equal(scaled, expected)
    assert all(torch.equal(sample, expected) for sample in found)


@pytest.mark.parametrize("kind", ["a module of ours", "diffusers' own class", "integers"])
def test_weights_without_their_codes_are_refused(kind: str, stable_diffusion: Calibrated, tmp_path: Path) -> None:
    unet: Any = load_quantized(stable_diffusion.artifact, backend="integer" if kind == "integers" else "simulated")
    unet = as_diffusers(unet) if kind == "diffusers' own class" else unet
    state = {name: 1.5 * x if x.is_floating_point() else x for name, x in unet.state_dict().items()}
    with pytest.raises(ModelError, match=r"load the (other )?artifact"):
        unet.load_state_dict(state)
    if kind == "integers":
        return
    unet.load_state_dict(unet.state_dict())
    layer = next(m for m in unet.modules() if isinstance(m, QuantLayer))
    with torch.no_grad():
        layer.layer.weight.mul_(1.5)
    with pytest.raises(ModelError, match="no longer what its codes stand for"):
        unet.save_pretrained(tmp_path / "changed")
    assert not (tmp_path / "changed").exists() or not any((tmp_path / "changed").glob("*.safetensors"))


def test_integers_give_no_gradients_and_say_so(stable_diffusion: Calibrated) -> None:
    pipe = stable_diffusion.quantized()
    given, integer = arguments_of(pipe), load_quantized(stable_diffusion.artifact, backend="integer")
    x = given["sample"].clone().requires_grad_()
    with pytest.raises(RuntimeUnsupportedError, match=r'backend="simulated".*no_grad'):
        integer(**given | {"sample": x})
    with torch.no_grad():
        assert torch.equal(integer(**given | {"sample": x}).sample, integer(**given).sample)
