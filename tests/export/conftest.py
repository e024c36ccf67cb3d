"""Artifacts of one tiny model with every kind of table and weight, their one skeleton, and runtimes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import torch
from diffusers import UNet2DModel
from numpy.typing import NDArray
from torch import Tensor, nn

from ptq_tdq.affine import choose_qparams
from ptq_tdq.artifacts import Artifact
from ptq_tdq.calib_data.loop import LoopSampler
from ptq_tdq.calls import Calls, record
from ptq_tdq.config import Config, preset
from ptq_tdq.evaluate.metrics import sqnr_db
from ptq_tdq.export.onnx.file import FORMS, encode_onnx
from ptq_tdq.export.onnx.floating import Floating
from ptq_tdq.export.onnx.skeleton import Skeleton, make_skeleton
from ptq_tdq.identity import base_config
from ptq_tdq.intervals import IntervalSource
from ptq_tdq.intervals.dynamic import Dynamic
from ptq_tdq.intervals.table import TableSource
from ptq_tdq.modules import ActivationQuantizer
from ptq_tdq.plan import make_plan
from ptq_tdq.quantized_model import QuantizedModel
from ptq_tdq.recon.weights import initialize

T = 1000
Arrays = dict[str, NDArray[Any]]


def make_unet() -> UNet2DModel:
    """Attention in the middle, split shortcuts, a strided convolution, classes."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        num_class_embeds=3,
    )
    return unet.eval().requires_grad_(False)


@dataclass(frozen=True)
class Case:
    """What an artifact is made of."""

    scheme: str
    tables: str  # "moving": scale and zero point depend on t; "scaled": the scale alone; "static"; "dynamic"
    symmetric: str = "never"
    weight_only: bool = False  # the time embedding and the first layer


CASES = {
    "W4A6": Case("W4A6", "moving"),
    "W8A8-affine": Case("W8A8", "moving"),
    "W8A8-symmetric": Case("W8A8", "scaled", "always"),
    "W3A4-dynamic": Case("W3A4", "dynamic"),
    "W6A8-static": Case("W6A8", "static", weight_only=True),
}


def inputs(batch: int = 4, size: tuple[int, int] = (8, 8)) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "sample": torch.randn(batch, 3, *size, generator=generator),
        "timestep": torch.linspace(0, T, batch).round(),
        "class_labels": torch.arange(batch) % 3,
    }


def make_calls(model: nn.Module, **arguments: Any) -> Calls:
    """One recorded call."""
    with record(model, num_train_timesteps=T) as calls, torch.no_grad():
        model(**arguments)
    return calls


def make_artifact(case: Case) -> Artifact:
    """An artifact of the tiny model."""
    unet = make_unet()
    config = preset(
        "default",
        scheme=case.scheme,
        method="dynamic" if case.tables == "dynamic" else "tdq-thin",
        weight_symmetric=case.symmetric,
        fixed_layers=(),
        float_input_layers=(),
        weight_only_layers=("time_embedding", "first") if case.weight_only else (),  # inputs of two axes and of four
    )
    return quantize(unet, config, make_calls(unet, **inputs()), case.tables)


def quantize(model: nn.Module, config: Config, calls: Calls, tables: str) -> Artifact:
    """Nearest rounding, and the ranges of one forward pass, narrowed so that some codes clip."""
    plan = make_plan(model, config, calls)
    quantized = QuantizedModel.copy_of(model, calls.axis, plan.layers)
    for layer in quantized.layers().values():
        initialize(layer, config)
    seen: dict[str, Tensor] = {}
    hooks = [
        quantizer.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
        for name, quantizer in quantized.quantizers().items()
    ]
    with torch.no_grad():
        for quantizer in quantized.quantizers().values():
            quantizer.enabled = True  # attention products are spelled out, without intervals so far
        quantized(**calls.inputs(slice(0, len(calls.groups[0]))))
    for hook in hooks:
        hook.remove()
    for name, quantizer in quantized.quantizers().items():
        quantizer.source = source(quantizer, seen[name], tables)
    quantized.provenance = {
        "base_model": {"id": "tiny", "sha256": "0" * 64},
        "model_config": base_config(model),
        "scheme": config.scheme,
        "method": config.method,
        "preset": "default",
        "choices": config.to_dict(),
        "time_axis": calls.axis.to_dict(),
        "calibration_set": {"sha256": "0" * 64},
        "seed": 0,
        "one_step": bool(plan.special.single),
        "versions": {},
    }
    return quantized.finalize().to_artifact()


def source(quantizer: ActivationQuantizer, x: Tensor, tables: str) -> IntervalSource:
    """Intervals of the kind that :class:`Case` names, for values in the range of ``x``."""
    t = torch.arange(T + 1)
    low = torch.zeros(()) if quantizer.record.from_zero else x.min() * 0.9
    scale, zero_point = choose_qparams(low, x.max() * 0.9, quantizer.qtype)
    if tables == "dynamic":
        return Dynamic(zero_point, quantizer.qtype)
    scales, zeros = scale.expand(T + 1), zero_point.expand(T + 1)
    if tables in ("moving", "scaled"):
        scales = scale * (1 + 0.3 * torch.sin(t / 150))
    if tables == "moving" and not quantizer.record.from_zero:
        zeros = (zeros + t // 200).clamp(0, quantizer.qtype.qmax)
    return TableSource(scales.contiguous(), zeros.to(torch.int32).contiguous())


@pytest.fixture(scope="session")
def artifact_of() -> Callable[[str], Artifact]:
    """Artifacts by the name of their case."""
    made: dict[str, Artifact] = {}

    def artifact(name: str) -> Artifact:
        if name not in made:
            made[name] = make_artifact(CASES[name])
        return made[name]

    return artifact


@pytest.fixture(scope="session")
def unet() -> UNet2DModel:
    """The tiny model."""
    return make_unet()


@pytest.fixture(scope="session")
def calls(unet: UNet2DModel) -> Calls:
    """Recorded calls of it."""
    return make_calls(unet, **inputs())


@pytest.fixture(scope="session")
def skeleton(artifact_of: Callable[[str], Artifact], calls: Calls) -> Skeleton:
    """One export for all cases: their float parts are the same."""
    return make_skeleton(artifact_of("W4A6"), calls)


@pytest.fixture(scope="session")
def quantize_model() -> Callable[..., tuple[Artifact, Calls]]:
    """``quantize_model(model, tables, **arguments)``: an artifact and the call of it."""

    def artifact(model: nn.Module, tables: str = "moving", **arguments: Any) -> tuple[Artifact, Calls]:
        calls = make_calls(model, **arguments)
        return quantize(model, preset("default", scheme="W4A8"), calls, tables), calls

    return artifact


@pytest.fixture(scope="session")
def sampled_ratios() -> Callable[..., list[float]]:
    """SQNR (dB) of each call of ``denoiser``, from the same x_t as the simulated model; 10 steps unless said.

    A tie that falls the other way grows over the steps of a random model.
    """

    def run(simulated: Any, denoiser: nn.Module, scheduler: Any, steps: int = 10) -> list[float]:
        ratios: list[float] = []

        class Both(nn.Module):
            def forward(self, *args: Any, **kwargs: Any) -> Any:
                expected, got = simulated(*args, **kwargs), denoiser(*args, **kwargs)
                ratios.append(sqnr_db(expected[0], got[0]))
                return got

        sampler = LoopSampler(simulated.model, scheduler)
        sampler.run(Both(), [2, 0], [torch.Generator().manual_seed(i) for i in (2, 3)], steps, sampler.scheduler)
        return ratios

    return run


@pytest.fixture(scope="session")
def encode(artifact_of: Callable[[str], Artifact], skeleton: Skeleton) -> Callable[[str, str], bytes]:
    """Files by case and runtime ("float" for the form without quantizers)."""
    made: dict[tuple[str, str], bytes] = {}

    def file(case: str, runtime: str) -> bytes:
        if (case, runtime) not in made:
            form = Floating if runtime == "float" else FORMS[runtime]
            made[case, runtime] = encode_onnx(artifact_of(case), form, skeleton, runtime)
        return made[case, runtime]

    return file


def run_onnxruntime(data: bytes, feed: Arrays, names: list[str]) -> Arrays:
    """The output under its name, and the inner tensors ``names``."""
    model = onnx.load_from_string(data)
    outputs = [model.graph.output[0].name, *names]
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return dict(zip(outputs, session.run(outputs, feed), strict=True))


def run_openvino(data: bytes, feed: Arrays, names: list[str]) -> Arrays:
    """The same with OpenVINO."""
    core = openvino.Core()
    model = core.read_model(data, b"")
    outputs = [model.outputs[0].get_any_name(), *names]
    if names:
        model.add_outputs(names)
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    results = core.compile_model(model, "CPU", options)(feed)
    return {name: np.array(results[name]) for name in outputs}


RUNNERS = {"onnxruntime": run_onnxruntime, "openvino": run_openvino}


@pytest.fixture(scope="session")
def run() -> Callable[..., Arrays]:
    """``run(runtime, data, feed, names)``."""

    def call(runtime: str, data: bytes, feed: dict[str, Tensor], names: list[str] | None = None) -> Arrays:
        return RUNNERS[runtime](data, {k: v.numpy() for k, v in feed.items()}, names or [])

    return call


@pytest.fixture(scope="session")
def feed() -> Callable[..., dict[str, Tensor]]:
    return inputs
