"""What is in an exported file, and what is not."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pandas as pd
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper
from own_denoiser import Own
from torch import Tensor, ones

from ptq_tdq.artifacts import Artifact
from ptq_tdq.calls import Calls, Group, Place, prediction
from ptq_tdq.errors import ArtifactError, ArtifactMismatchError, MissingExtraError, ModelError, UsageError
from ptq_tdq.evaluate.metrics import sqnr_db
from ptq_tdq.export import export_tables
from ptq_tdq.export.onnx import FORMS, OnnxDenoiser, export_onnx, export_onnx_float
from ptq_tdq.export.onnx import file as onnx_file
from ptq_tdq.export.onnx.file import encode_onnx
from ptq_tdq.export.onnx.signature import describe
from ptq_tdq.export.onnx.skeleton import Skeleton
from ptq_tdq.export.onnx.trial import try_out
from ptq_tdq.load import build_quantized
from ptq_tdq.timeaxis import TimeAxis
from ptq_tdq.timed_model import TimedModel

NO_CALLS = Calls(TimeAxis("timestep"))
RUNTIMES = ("portable", "onnxruntime", "openvino", "float")


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_opset_21_of_standard_operators(runtime: str, encode: Callable[[str, str], bytes]) -> None:
    data = encode("W4A6", runtime)
    onnx.checker.check_model(data, full_check=True)
    model = onnx.load_from_string(data)
    assert {(o.domain, o.version) for o in model.opset_import} == {("", 21)}
    assert model.ir_version <= 10
    assert {node.domain for node in model.graph.node} == {""}
    assert len({node.name for node in model.graph.node}) == len(model.graph.node)
    shapes = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in model.graph.input}
    assert shapes == {
        "sample": ["batch", 3, "height", "width"],
        "timestep": ["batch"],
        "class_labels": ["batch"],
    }
    assert [v.name for v in model.graph.output] == ["out_sample"]


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_nothing_tells_where_it_was_made(runtime: str, encode: Callable[[str, str], bytes]) -> None:
    data = encode("W4A6", runtime)
    assert str(Path.home()).encode() not in data
    assert b".py" not in data


def test_the_same_artifact_gives_the_same_bytes(
    encode: Callable[[str, str], bytes], artifact_of: Callable[[str], Artifact], skeleton: Skeleton
) -> None:
    again = encode_onnx(artifact_of("W4A6"), FORMS["onnxruntime"], skeleton, "onnxruntime")
    assert again == encode("W4A6", "onnxruntime")


@pytest.mark.parametrize("runtime", ["portable", "onnxruntime", "openvino"])
@pytest.mark.parametrize(
    ("case", "bits"), [("W4A6", 4), ("W8A8-symmetric", 8), ("W8A8-affine", 8), ("W3A4-dynamic", 4)]
)
def test_weights_and_tables_are_stored_once_and_as_integers(
    case: str, bits: int, runtime: str, encode: Callable[[str, str], bytes], artifact_of: Callable[[str], Artifact]
) -> None:
    artifact = artifact_of(case)
    stored = {i.name: i for i in onnx.load_from_string(encode(case, runtime)).graph.initializer}
    narrow, wide = {TensorProto.UINT4}, {TensorProto.UINT8, TensorProto.INT8}
    for layer in artifact.layers:
        parts = max(1, len(layer.splits) - 1)
        for i in range(parts if layer.weight_bits else 0):
            name = f"{layer.name}.weight" if parts == 1 else f"{layer.name}.{i}.weight"
            assert stored[name].data_type in (narrow if (layer.weight_bits or 8) <= 4 else wide), name
            numel = int(np.prod(stored[name].dims))
            assert len(stored[name].raw_data) == numel * (layer.weight_bits or 8 if layer.weight_bits == 8 else 4) // 8
    floats = sum(
        int(np.prod(i.dims)) for i in stored.values() if i.data_type == TensorProto.FLOAT and "table" not in i.name
    )
    kept = sum(value.numel() for value in artifact.float_state.values())
    channels = sum(scale.numel() for scale in artifact.weight_scale.values())
    assert floats <= kept + 12 * channels  # scales, zero points and sums of weights, one number per channel
    if case == "W4A6":
        names = [q.name for q in artifact.quantizers if len(artifact.tables[q.name].scale.unique()) > 1]
        table = numpy_helper.to_array(stored["scale_table"])
        np.testing.assert_array_equal(table, np.stack([artifact.tables[n].scale for n in names], 1))


def test_a_folder_is_exported_as_its_artifact(artifact_of: Callable[[str], Artifact], tmp_path: Path) -> None:
    build_quantized(artifact_of("W3A4-dynamic")).save_pretrained(tmp_path / "saved")
    for given in (str(tmp_path / "saved"), build_quantized(artifact_of("W3A4-dynamic"))):
        with pytest.raises(UsageError, match="is dynamic: its scale is found at run time"):
            export_onnx_float(given, tmp_path / "model.onnx", NO_CALLS)
    with pytest.raises(ArtifactError, match="nowhere"):
        export_onnx(tmp_path / "nowhere", tmp_path / "model.onnx", "portable", NO_CALLS)


def test_the_file_says_what_it_is(encode: Callable[[str, str], bytes]) -> None:
    (entry,) = onnx.load_from_string(encode("W4A6", "openvino")).metadata_props
    facts = json.loads(entry.value)
    assert (entry.key, facts["runtime"], facts["scheme"]) == ("ptq_tdq", "openvino", "W4A6")
    assert facts["time_axis"] == {"argument": "timestep", "num_train_timesteps": 1000, "scale": 1.0, "offset": 0.0}
    assert facts["free_sizes"] == ["batch", "height", "width"]


def test_the_float_graph_is_the_model_without_activation_quantizers(
    encode: Callable[[str, str], bytes],
    artifact_of: Callable[[str], Artifact],
    run: Callable[..., dict[str, NDArray[Any]]],
    feed: Callable[..., dict[str, Tensor]],
) -> None:
    given = feed()
    model = build_quantized(artifact_of("W4A6")).quantize(activations=False)
    got = run("onnxruntime", encode("W4A6", "float"), given)["out_sample"]
    np.testing.assert_allclose(got, model(**given).sample, rtol=1e-4, atol=1e-5)


def test_names_of_the_float_graph_are_those_of_the_table(
    encode: Callable[[str, str], bytes], artifact_of: Callable[[str], Artifact], tmp_path: Path
) -> None:
    export_tables(artifact_of("W4A6"), tmp_path / "table.csv", "csv")
    kinds = {n.name: n.op_type for n in onnx.load_from_string(encode("W4A6", "float")).graph.node}
    names = set(pd.read_csv(tmp_path / "table.csv")["layer"])
    assert {kinds[name] for name in names} == {"Conv", "MatMul", "Identity"}
    assert {name.rpartition(".")[2] for name in names if kinds[name] == "Identity"} == {"q", "k", "v", "softmax"}


def test_codes_are_recovered_from_the_annotated_float_weights(
    encode: Callable[[str, str], bytes], artifact_of: Callable[[str], Artifact]
) -> None:
    artifact, graph = artifact_of("W4A6"), onnx.load_from_string(encode("W4A6", "float")).graph
    stored = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    annotated = {
        a.tensor_name: {p.key: p.value for p in a.quant_parameter_tensor_names} for a in graph.quantization_annotation
    }
    for layer in artifact.layers:
        for i, (low, high) in enumerate(layer.ranges):
            name = f"{layer.name}.weight" if len(layer.ranges) == 1 else f"{layer.name}.{i}.weight"
            weight = stored[name].T if layer.kind == "linear" else stored[name]
            shape = (-1,) + (1,) * (weight.ndim - 1)
            scale, zero_point = (stored[annotated[name][key]] for key in ("SCALE_TENSOR", "ZERO_POINT_TENSOR"))
            codes = np.rint(weight / scale.reshape(shape)) + zero_point.reshape(shape)
            np.testing.assert_array_equal(codes, artifact.weight_codes[layer.name][:, low:high])


def test_unknown_runtime(tmp_path: Path, artifact_of: Callable[[str], Artifact]) -> None:
    with pytest.raises(UsageError, match=r"one of portable, onnxruntime, openvino\. Got 'tensorrt' instead"):
        export_onnx(artifact_of("W4A6"), tmp_path / "model.onnx", "tensorrt", NO_CALLS)
    assert list(tmp_path.iterdir()) == []


def test_an_export_needs_a_call(tmp_path: Path, artifact_of: Callable[[str], Artifact]) -> None:
    with pytest.raises(ModelError, match="no recorded call to export the model with"):
        export_onnx(artifact_of("W4A6"), tmp_path / "model.onnx", "portable", NO_CALLS)


def test_a_network_that_finds_intervals_has_no_form(
    tmp_path: Path, artifact_of: Callable[[str], Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(onnx_file, "make_skeleton")  # not asked for: the cheap reason to refuse comes first
    artifact = artifact_of("W3A4-dynamic")
    tables = {name: replace(table, generator={"net.0.weight": ones(1)}) for name, table in artifact.tables.items()}
    with pytest.raises(ModelError, match="asks a network"):
        export_onnx(replace(artifact, tables=tables), tmp_path / "model.onnx", "portable", NO_CALLS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("package", "extra"), [("onnxruntime", "onnx"), ("openvino", "openvino")])
def test_a_missing_runtime_names_its_extra(
    package: str, extra: str, tmp_path: Path, encode: Callable[[str, str], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model.onnx").write_bytes(encode("W4A6", "portable"))
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=rf"pip install 'ptq-tdq\[{extra}\]'"):
        OnnxDenoiser(tmp_path / "model.onnx", runtime=package)


def test_a_missing_exporter_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.startswith("ptq_tdq.export.onnx")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "onnx_ir", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'ptq-tdq\[onnx\]'"):
        import ptq_tdq.export.onnx  # noqa: F401


ROWS = {"sample": torch.linspace(-1, 1, 24).view(2, 3, 4), "timestep": torch.tensor([900.0, 100.0])}


@pytest.fixture(scope="module")
def own(quantize_model: Callable[..., tuple[Artifact, Calls]]) -> tuple[Artifact, Calls]:
    torch.manual_seed(0)
    return quantize_model(Own().requires_grad_(False), **ROWS)


def test_a_class_of_ones_own_is_exported_with_an_instance(tmp_path: Path, own: tuple[Artifact, Calls]) -> None:
    artifact, calls = own
    with pytest.raises(ArtifactMismatchError, match="is of a 'Own'"):
        export_onnx(artifact, tmp_path / "model.onnx", "portable", calls)
    export_onnx(artifact, tmp_path / "model.onnx", "portable", calls, model=Own())
    graph, expected = OnnxDenoiser(tmp_path / "model.onnx", threads=1), build_quantized(artifact, Own())(**ROWS)
    assert sqnr_db(expected, graph(**ROWS)) > 40
    assert not hasattr(graph, "add_embedding")


def test_two_files_for_hardware_teams(
    tmp_path: Path, artifact_of: Callable[[str], Artifact], own: tuple[Artifact, Calls]
) -> None:
    table = export_onnx_float(own[0], tmp_path / "model.onnx", own[1], model=Own())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.csv", "model.onnx"]
    assert table == tmp_path / "model.csv"
    with pytest.raises(UsageError, match=r"goes to '.*model.csv'; name the graph 'model.onnx' instead"):
        export_onnx_float(artifact_of("W4A6"), tmp_path / "model.csv", NO_CALLS)
    with pytest.raises(UsageError, match="is dynamic"):
        export_onnx_float(artifact_of("W3A4-dynamic"), tmp_path / "dynamic.onnx", NO_CALLS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.csv", "model.onnx"]


def test_an_output_that_no_graph_can_give_is_refused() -> None:
    class Output(Own):
        def forward(self, sample: Tensor, timestep: Tensor) -> Any:
            return SimpleNamespace(sample=super().forward(sample, timestep))

    calls = Calls(TimeAxis("timestep"), [Group({"sample": Place(0), "timestep": Place(1)}, list(ROWS.values()))])
    with pytest.raises(ModelError, match="returns an object of type SimpleNamespace, which no graph can give"):
        describe(TimedModel(Output(), calls.axis), calls)


def test_a_graph_that_computes_something_else_is_refused(
    encode: Callable[[str, str], bytes], artifact_of: Callable[[str], Artifact], calls: Calls
) -> None:
    graph, simulated = encode("W4A6", "portable"), build_quantized(artifact_of("W4A6"))
    try_out(graph, calls, simulated)
    for change in (lambda x: x + 1, lambda x: -x, lambda x: x.transpose(-1, -2), lambda x: x * math.nan):
        with pytest.raises(ModelError, match="computes something else"):
            try_out(graph, calls, lambda change=change, **inputs: change(prediction(simulated(**inputs))))
