"""Static graphs for time steps, in one folder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from diffusers import DDIMScheduler
from own_denoiser import Own
from processors import needs_wide_sums
from recorded import calls_of
from torch import nn
from unets import tiny_unet

from ptq_tdq import calibrate, preset
from ptq_tdq.artifacts import Artifact
from ptq_tdq.calib_data.loop import LoopSampler
from ptq_tdq.calls import Calls, record
from ptq_tdq.errors import ModelError, TimestepError
from ptq_tdq.evaluate.metrics import sqnr_db
from ptq_tdq.export.onnx import OnnxDenoiser, export_onnx, export_onnx_steps
from ptq_tdq.export.onnx.by_step import groups_of_steps
from ptq_tdq.export.onnx.file import write_steps
from ptq_tdq.export.onnx.skeleton import Skeleton
from ptq_tdq.export.onnx.weights import range_weights
from ptq_tdq.load import build_quantized

STEPS = 5


@pytest.fixture(scope="module")
def sampled(unet: nn.Module) -> Calls:
    """The calls of a sampling run."""
    sampler = LoopSampler(unet, DDIMScheduler())
    with record(unet, num_train_timesteps=1000) as calls:
        sampler.run(unet, [2, 0], [torch.Generator().manual_seed(i) for i in (2, 3)], STEPS, sampler.scheduler)
    return calls


@pytest.fixture(scope="module", params=["W4A6", "W8A8-affine", "W8A8-symmetric"])
def exported(
    request: Any, tmp_path_factory: pytest.TempPathFactory, artifact_of: Callable[[str], Artifact], sampled: Calls,
    skeleton: Skeleton,
) -> tuple[Artifact, Path]:  # fmt: skip
    artifact, folder = artifact_of(request.param), tmp_path_factory.mktemp("graphs")
    write_steps(artifact, folder, skeleton, groups_of_steps(artifact, sampled.t.unique().tolist()))
    return artifact, folder


@pytest.mark.parametrize("runtime", ["onnxruntime", pytest.param("openvino", marks=needs_wide_sums)])
def test_it_samples_as_the_simulated_model_does(
    exported: tuple[Artifact, Path], runtime: str, sampled_ratios: Callable[..., list[float]]
) -> None:
    artifact, folder = exported
    simulated, denoiser = build_quantized(artifact), OnnxDenoiser(folder, runtime=runtime, threads=1)
    ratios = sampled_ratios(simulated, denoiser, DDIMScheduler(), STEPS)
    assert len(ratios) == STEPS
    assert min(ratios) > 25


def test_all_parameters_are_constants_of_standard_types(exported: tuple[Artifact, Path]) -> None:
    """Scales and zero points are initializers, activations UINT8, weights INT8; no other operators, no lookup."""
    files = sorted(exported[1].glob("*.onnx"))
    assert len(files) == STEPS
    for file in files:
        graph = onnx.load(file, load_external_data=False).graph
        arrays = {tensor.name: tensor for tensor in graph.initializer}
        pairs = [node for node in graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
        assert pairs
        assert all(set(node.input[1:]) - {""} <= set(arrays) for node in pairs)
        kinds = {arrays[node.input[0]].data_type for node in pairs if node.input[0] in arrays}
        assert kinds == {onnx.TensorProto.INT8}
        assert {node.domain for node in graph.node} == {""}
        assert not any(node.op_type == "Gather" and "table" in node.input[0] for node in graph.node)


def test_the_graphs_share_their_weights(exported: tuple[Artifact, Path]) -> None:
    """Each array that is large is in the common file, once."""
    folder, places = exported[1], dict[int, int]()
    for file in folder.glob("*.onnx"):
        for tensor in onnx.load(file, load_external_data=False).graph.initializer:
            assert len(tensor.raw_data) < 1024
            found = {entry.key: entry.value for entry in tensor.external_data}
            if found:
                assert found["location"] == "weights.bin"
                places[int(found["offset"])] = int(found["length"])
    assert len(places) > 10
    assert sum(places.values()) == (folder / "weights.bin").stat().st_size


def test_mixed_steps_and_unknown_ones(exported: tuple[Artifact, Path], sampled: Calls) -> None:
    artifact, folder = exported
    denoiser, simulated = OnnxDenoiser(folder, threads=1), build_quantized(artifact)
    arguments = sampled.inputs(torch.tensor([0, len(sampled.t) - 1]))
    assert len(set(arguments["timestep"].tolist())) == 2
    assert sqnr_db(simulated(**arguments)[0], denoiser(**arguments)[0]) > 25
    with pytest.raises(TimestepError, match="no graph for t = 7, only for"):
        denoiser(**{**arguments, "timestep": torch.tensor([7, 7])})


@pytest.fixture(scope="module", params=["W4A6", "W8A8-symmetric"])
def narrow(
    request: Any, tmp_path_factory: pytest.TempPathFactory, artifact_of: Callable[[str], Artifact], sampled: Calls
) -> tuple[Artifact, Path]:
    """As ``exported``, with outputs of convolutions in 8 bits."""
    artifact, folder = artifact_of(request.param), tmp_path_factory.mktemp("narrow")
    export_onnx_steps(artifact, folder, sampled, int8_outputs=True)
    return artifact, folder


@pytest.mark.parametrize("runtime", ["onnxruntime", pytest.param("openvino", marks=needs_wide_sums)])
@torch.no_grad()
def test_outputs_in_eight_bits_cost_little(
    narrow: tuple[Artifact, Path], runtime: str, sampled: Calls, unet: nn.Module
) -> None:
    artifact, folder = narrow
    denoiser, simulated = OnnxDenoiser(folder, runtime=runtime, threads=1), build_quantized(artifact)
    for row in range(len(sampled)):
        arguments = sampled.inputs(torch.tensor([row]))
        full, wide, found = (model(**arguments)[0] for model in (unet, simulated, denoiser))
        assert sqnr_db(full, found) > sqnr_db(full, wide) - 5


def test_all_inner_convolutions_are_kernels_of_integers(narrow: tuple[Artifact, Path], tmp_path: Path) -> None:
    """onnxruntime's own graph: what it has left in floating point is known, and why."""
    artifact, folder = narrow
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(str(next(folder.glob("*.onnx"))), options, providers=["CPUExecutionProvider"])
    kinds = Counter(
        node.op_type for node in onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph.node
    )
    records = [r for r in artifact.layers if r.kind == "conv2d"]
    inner = [r for r in records if r.inputs and r.name != "conv_out"]
    assert len(inner) > 10
    affine = {w.name.removesuffix(".weight") for r in inner for w in range_weights(artifact, r) if w.rest is not None}
    expected = sum(len(r.inputs) for r in inner if not any(n.startswith(r.name) for n in affine))
    assert kinds["QLinearConv"] == expected


def test_static_intervals_need_one_graph(tmp_path: Path, quantize_model: Callable[..., tuple[Artifact, Calls]]) -> None:
    model, t = Own().requires_grad_(False), torch.linspace(0, 1000, STEPS)
    artifact, calls = quantize_model(model, "static", sample=torch.randn(STEPS, 3, 4), timestep=t)
    (steps,) = export_onnx_steps(artifact, tmp_path / "graphs", calls, model=model)
    assert len(steps) == STEPS
    assert len(list((tmp_path / "graphs").glob("*.onnx"))) == 1


@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "graphs"), (torch.float16, "model.onnx")])
@torch.no_grad()
def test_a_model_in_half_precision_becomes_graphs_in_float32(tmp_path: Path, dtype: torch.dtype, name: str) -> None:
    blocks = {"down_block_types": ("AttnDownBlock2D",), "up_block_types": ("UpBlock2D",), "add_attention": False}
    model, t = tiny_unet(block_out_channels=(8,), **blocks).to(dtype), torch.tensor([900, 300])
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=dtype)
    calls = calls_of(model, x, t, num_train_timesteps=1000)
    config = preset("default", scheme="W8A8", method="static", rounding="nearest", activation_iterations=0)
    quantized = calibrate(model, config, calls)
    if name == "graphs":
        export_onnx_steps(quantized, tmp_path / name, calls, int8_outputs=True)
    else:
        export_onnx(quantized, tmp_path / name, "portable", calls)
    found = OnnxDenoiser(tmp_path / name, threads=1)(x, t)[0]
    assert found.dtype == dtype and sqnr_db(quantized(x, t)[0], found) > 20


def test_weights_alone_need_one_graph(tmp_path: Path) -> None:
    model, x, t = Own().requires_grad_(False), torch.randn(STEPS, 3, 4), torch.linspace(0, 1000, STEPS)
    calls = calls_of(model, x, t, num_train_timesteps=1000)
    weights = {"weight_only_layers": ("first", "time_embedding"), "skip": ("last",)}
    config = preset("default", rounding="nearest", activation_iterations=0, **weights)
    quantized = calibrate(model, config, calls)
    (steps,) = export_onnx_steps(quantized.to_artifact(), tmp_path / "graphs", calls, model=model)
    assert len(steps) == STEPS
    with torch.no_grad():
        assert sqnr_db(quantized(x, t), OnnxDenoiser(tmp_path / "graphs", threads=1)(x, t)) > 60


def test_intervals_of_tensors_are_refused(
    tmp_path: Path, artifact_of: Callable[[str], Artifact], sampled: Calls
) -> None:
    with pytest.raises(ModelError, match="finds its interval in each tensor"):
        export_onnx_steps(artifact_of("W3A4-dynamic"), tmp_path / "graphs", sampled)
    assert not (tmp_path / "graphs").exists()


def test_a_graph_reads_no_other_file(exported: tuple[Artifact, Path], tmp_path: Path) -> None:
    model = onnx.load(next(exported[1].glob("*.onnx")), load_external_data=False)
    tensor = next(x for x in model.graph.initializer if x.external_data)
    next(entry for entry in tensor.external_data if entry.key == "location").value = "../secret"
    (tmp_path / "t0000.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match=r"asks for the file '\.\./secret'"):
        OnnxDenoiser(tmp_path)


def test_a_folder_of_other_graphs_is_refused(tmp_path: Path, encode: Callable[[str, str], bytes]) -> None:
    with pytest.raises(ModelError, match="has no graphs"):
        OnnxDenoiser(tmp_path)
    (tmp_path / "model.onnx").write_bytes(encode("W4A6", "portable"))
    with pytest.raises(ModelError, match="not for some time steps alone"):
        OnnxDenoiser(tmp_path)
