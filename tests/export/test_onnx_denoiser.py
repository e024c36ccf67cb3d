"""An exported file in a diffusers pipeline."""

from __future__ import annotations

import json
import math
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from diffusers.utils import BaseOutput
from fuzzing import changed_json
from own_denoiser import Own
from processors import needs_wide_sums
from recorded import calls_of
from torch import Tensor, nn

from ptq_tdq import calibrate, preset
from ptq_tdq.artifacts import Artifact
from ptq_tdq.calls import Calls
from ptq_tdq.errors import (
    ModelError,
    NonFiniteError,
    PtqTdqError,
    RuntimeUnsupportedError,
    TimestepError,
    UsageError,
)
from ptq_tdq.evaluate.metrics import sqnr_db
from ptq_tdq.export.onnx import OnnxDenoiser, export_onnx
from ptq_tdq.export.onnx.skeleton import METADATA
from ptq_tdq.load import build_quantized

# The file's form and the runtime that runs it; integer kernels need a processor that adds them without saturating.
RUNS = [
    pytest.param("onnxruntime", "onnxruntime", id="onnxruntime", marks=needs_wide_sums),
    pytest.param("openvino", "openvino", id="openvino", marks=needs_wide_sums),
    pytest.param("portable", "onnxruntime", id="portable-onnxruntime"),
    pytest.param("portable", "openvino", id="portable-openvino"),
]


@pytest.fixture
def file_of(tmp_path: Path, encode: Callable[[str, str], bytes]) -> Callable[[str, str], Path]:
    def write(case: str, runtime: str) -> Path:
        path = tmp_path / f"{case}.{runtime}.onnx"
        path.write_bytes(encode(case, runtime))
        return path

    return write


@pytest.mark.parametrize(("form", "runtime"), RUNS)
@pytest.mark.parametrize("scheduler", [DDIMScheduler(), EulerDiscreteScheduler()], ids=["integer-t", "fractional-t"])
def test_it_samples_as_the_simulated_model_does(
    form: str,
    runtime: str,
    scheduler: Any,
    file_of: Callable[[str, str], Path],
    artifact_of: Callable[[str], Artifact],
    sampled_ratios: Callable[..., list[float]],
) -> None:
    simulated = build_quantized(artifact_of("W8A8-symmetric"))
    denoiser = OnnxDenoiser(file_of("W8A8-symmetric", form), runtime=runtime, threads=1)
    assert denoiser.runtime == runtime
    ratios = sampled_ratios(simulated, denoiser, scheduler)
    assert len(ratios) == 10
    assert min(ratios) > 25


@pytest.mark.parametrize(("form", "runtime"), RUNS)
def test_other_batches_and_sizes(
    form: str,
    runtime: str,
    file_of: Callable[[str, str], Path],
    artifact_of: Callable[[str], Artifact],
    feed: Callable[..., dict[str, Tensor]],
) -> None:
    simulated = build_quantized(artifact_of("W8A8-affine"))
    denoiser = OnnxDenoiser(file_of("W8A8-affine", form), runtime=runtime, threads=1)
    for batch, size in ((1, (8, 8)), (3, (12, 16))):
        given = feed(batch, size)
        expected = simulated(**given).sample
        assert sqnr_db(expected, denoiser(**given).sample) > 25
        assert sqnr_db(expected, denoiser(*given.values(), return_dict=False)[0]) > 25


def test_one_t_serves_the_whole_batch(
    file_of: Callable[[str, str], Path], feed: Callable[..., dict[str, Tensor]]
) -> None:
    unet, given = OnnxDenoiser(file_of("W4A6", "portable"), threads=1), feed(3)
    each = unet(given["sample"], torch.full((3,), 640), given["class_labels"]).sample
    for t in (640, 640.0, torch.tensor(640), torch.tensor([640])):
        torch.testing.assert_close(unet(given["sample"], t, given["class_labels"]).sample, each, rtol=0, atol=0)


def test_it_is_what_a_pipeline_asks_for(
    file_of: Callable[[str, str], Path], artifact_of: Callable[[str], Artifact]
) -> None:
    unet = OnnxDenoiser(file_of("W4A6", "portable"), threads=1)
    assert (unet.config.in_channels, unet.config["sample_size"], unet.dtype) == (3, 8, torch.float32)
    assert unet.config.get("nothing") is None
    assert unet.device == torch.device("cpu")
    assert unet.facts["scheme"] == "W4A6"


@pytest.mark.parametrize("t", [-1, 1001, float("nan")])
def test_a_time_step_outside_the_tables_is_an_error(t: float, file_of: Callable[[str, str], Path]) -> None:
    unet = OnnxDenoiser(file_of("W4A6", "portable"), threads=1)
    with pytest.raises(TimestepError, match=r"cover the time steps 0 to 1000\. Got t ="):
        unet(torch.zeros(1, 3, 8, 8), t, torch.tensor([0]))


def test_a_portable_file_runs_on_both(
    file_of: Callable[[str, str], Path], feed: Callable[..., dict[str, Tensor]]
) -> None:
    path, given = file_of("W8A8-symmetric", "portable"), feed(2)
    first = OnnxDenoiser(path, threads=1)
    second = OnnxDenoiser(path, runtime="openvino", threads=1)
    assert (first.runtime, second.runtime) == ("onnxruntime", "openvino")
    assert sqnr_db(first(**given).sample, second(**given).sample) > 25


def test_files_that_cannot_be_run(tmp_path: Path, file_of: Callable[[str, str], Path]) -> None:
    (tmp_path / "text.onnx").write_text("not a graph")
    with pytest.raises(ModelError, match=r"not an ONNX file that `ptq-tdq export` has written"):
        OnnxDenoiser(tmp_path / "text.onnx")
    with pytest.raises(ModelError, match="cannot be read"):
        OnnxDenoiser(tmp_path / "absent.onnx")
    with pytest.raises(ModelError, match="was exported for onnxruntime; export it for openvino"):
        OnnxDenoiser(file_of("W4A6", "onnxruntime"), runtime="openvino")
    with pytest.raises(UsageError, match=r"must be one of onnxruntime, openvino\. Got 'tensorrt' instead"):
        OnnxDenoiser(file_of("W4A6", "portable"), runtime="tensorrt")


@pytest.mark.parametrize("form", ["onnxruntime", "openvino"])
def test_a_processor_that_would_saturate_is_refused(
    form: str, file_of: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ptq_tdq.export.onnx.denoiser.sums_eight_bits", lambda: False)
    with pytest.raises(RuntimeUnsupportedError, match=rf"{form} lets saturate .* export it with --runtime portable"):
        OnnxDenoiser(file_of("W4A6", form))
    OnnxDenoiser(file_of("W4A6", "portable"))


def test_calls_other_than_those_of_the_export_are_named(file_of: Callable[[str, str], Path]) -> None:
    unet, x, labels = OnnxDenoiser(file_of("W4A6", "portable"), threads=1), torch.zeros(1, 3, 8, 8), torch.tensor([0])
    with pytest.raises(ModelError, match="The graph needs class_labels"):
        unet(x, 0)
    with pytest.raises(ModelError, match=r"takes other arguments .*unexpected keyword argument 'guidance'"):
        unet(x, 0, labels, guidance=1.0)
    with pytest.raises(ModelError, match=r"takes sample in the shape \[any, 3, any, any\]\. Got \[1, 4, 8, 8\]"):
        unet(torch.zeros(1, 4, 8, 8), 0, labels)


@pytest.mark.parametrize(("form", "runtime"), RUNS)
def test_arguments_that_the_model_refuses_are_refused(
    form: str, runtime: str, file_of: Callable[[str, str], Path], feed: Callable[..., dict[str, Tensor]]
) -> None:
    unet, x = OnnxDenoiser(file_of("W4A6", form), runtime=runtime, threads=1), feed(2)["sample"]
    one, labels = torch.tensor([1]), torch.tensor([0, 1])
    for t, message in (
        (True, "called with timestep = True"),
        ("5", "called with timestep = '5'"),
        (torch.tensor([5, 5, 9]), "timestep for 3 samples, and 2 samples"),
    ):
        with pytest.raises(PtqTdqError, match=message):
            unet(x, t, labels)
    with pytest.raises(ModelError, match="timestep for 2 samples, and 1 samples"):
        unet(x[:1], torch.tensor([5, 9]), one)
    with pytest.raises(ModelError, match="class_labels for 3 samples"):
        unet(x, 5, torch.tensor([0, 1, 1]))
    with pytest.raises(ModelError, match="class_labels in whole numbers"):
        unet(x, 5, torch.tensor([0.0, 1.7]))
    for labels in (torch.tensor([0, -1]), torch.tensor([0, 99])):
        with pytest.raises(ModelError, match=r"class_labels from 0 to \d+\. Got"):
            unet(x, 5, labels)
    with pytest.raises(ModelError, match="no sample"):
        unet(x[:0], 5, one[:0])
    mixed = torch.tensor([5, 9])
    assert torch.equal(unet(x, mixed, one).sample, unet(x, mixed, one.expand(2)).sample)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_size_that_the_model_does_not_take_is_one_sentence(
    runtime: str,
    file_of: Callable[[str, str], Path],
    feed: Callable[..., dict[str, Tensor]],
    capfd: pytest.CaptureFixture[str],
) -> None:
    unet = OnnxDenoiser(file_of("W4A6", "portable"), runtime=runtime, threads=1)
    with pytest.raises(ModelError, match="does not run this graph, or not with such sizes") as caught:
        unet(**feed(2, (9, 8)))
    assert len(str(caught.value).splitlines()) == 1
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_that_codes_cannot_hold_are_refused(
    bad: float, file_of: Callable[[str, str], Path], feed: Callable[..., dict[str, Tensor]]
) -> None:
    given = feed(2)
    given["sample"][0, 0, 3, 3] = bad
    with pytest.raises(NonFiniteError, match="given NaN or Inf"):
        OnnxDenoiser(file_of("W4A6", "portable"), threads=1)(**given)


def test_a_pickled_one_opens_its_file_again(
    file_of: Callable[[str, str], Path], feed: Callable[..., dict[str, Tensor]]
) -> None:
    unet = OnnxDenoiser(file_of("W4A6", "portable"), runtime="openvino", threads=1)
    again = pickle.loads(pickle.dumps(unet))
    assert again.runtime == "openvino"
    torch.testing.assert_close(again(**feed()).sample, unet(**feed()).sample)


class Bottleneck(nn.Module):
    """Convolutions without anything in between, whose channels differ in size, as those of trained models do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.time, self.first = nn.Linear(1, 16), nn.Conv2d(3, 16, 3, padding=1)
        self.a, self.b = nn.Conv2d(16, 32, 1), nn.Conv2d(32, 16, 3, padding=1)
        self.last = nn.Conv2d(16, 3, 3, padding=1)
        with torch.no_grad():
            sizes = torch.logspace(0, -2.5, 32)
            self.a.weight *= sizes[:, None, None, None]
            self.b.weight /= sizes[None, :, None, None]

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        y = self.first(x) + self.time(timestep.float()[:, None] / 1000)[:, :, None, None]
        result: Tensor = self.last(torch.relu(self.b(self.a(torch.relu(y)))))
        return result


def test_onnxruntime_rounds_the_weights_of_a_portable_file_no_second_time(tmp_path: Path) -> None:
    model = Bottleneck().eval().requires_grad_(False)
    given = {"x": torch.randn(4, 3, 8, 8), "timestep": torch.tensor([900.0, 600.0, 300.0, 1.0])}
    calls = calls_of(model, **given, num_train_timesteps=1000)
    config = preset("default", scheme="W8A8", method="static", rounding="nearest", activation_iterations=0)
    quantized = calibrate(model, config, calls)
    export_onnx(quantized.to_artifact(), tmp_path / "p.onnx", "portable", calls, model=Bottleneck())
    session = onnxruntime.InferenceSession(tmp_path / "p.onnx", providers=["CPUExecutionProvider"])  # with all it does
    with torch.no_grad():
        expected = quantized(**given)
    feed = {value.name: given[value.name].numpy() for value in session.get_inputs()}
    assert sqnr_db(expected, torch.from_numpy(session.run(None, feed)[0])) > 60


def test_results_belong_to_the_caller(
    file_of: Callable[[str, str], Path], feed: Callable[..., dict[str, Tensor]]
) -> None:
    unet, given = OnnxDenoiser(file_of("W4A6", "portable"), runtime="openvino", threads=1), feed(2)
    first = unet(**given).sample
    before = first.clone()
    unet(-given["sample"], given["timestep"], given["class_labels"])
    np.testing.assert_array_equal(first, before)


class TokensFirst(nn.Module):
    """Its rows cannot be told apart by sample, so each call has one time step."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inside, self.last = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """sample [B, N, 4]."""
        y = self.first(sample) + timestep[:, None, None] / 1000
        result: Tensor = self.last(self.inside(y.transpose(0, 1).tanh()).transpose(0, 1))
        return result


@torch.no_grad()
def test_time_steps_of_a_batch_may_differ_also_where_rows_are_of_no_one_sample(
    tmp_path: Path, quantize_model: Callable[..., tuple[Artifact, Calls]]
) -> None:
    torch.manual_seed(0)
    x, t = torch.randn(3, 3, 4), torch.tensor([900.0, 100.0, 400.0])
    artifact, calls = quantize_model(TokensFirst(), sample=x, timestep=t)
    export_onnx(artifact, tmp_path / "model.onnx", "portable", calls, model=TokensFirst())
    graph, simulated = OnnxDenoiser(tmp_path / "model.onnx", threads=1), build_quantized(artifact, TokensFirst())
    assert graph.facts["one_step"] and "batch" in graph.facts["free_sizes"]
    for steps in (t, t[[1, 1, 1]]):
        assert sqnr_db(simulated(x, steps), graph(x, steps)) > 40


@needs_wide_sums
def test_a_graph_of_one_time_step_refuses_a_call_of_several(
    encode: Callable[[str, str], bytes], run: Callable[..., dict[str, Any]], feed: Callable[..., dict[str, Tensor]]
) -> None:
    """Whoever runs the file without OnnxDenoiser gets an error, not the first sample's intervals for all."""
    given = feed(2)
    assert len(set(given["timestep"].tolist())) == 2
    with pytest.raises(Exception, match="out of data bounds"):
        run("onnxruntime", encode("W4A6", "onnxruntime"), given)
    given["timestep"] = given["timestep"][[1, 1]]
    assert np.isfinite(run("onnxruntime", encode("W4A6", "onnxruntime"), given)["out_sample"]).all()


@needs_wide_sums
def test_samples_that_share_a_time_step_run_together(
    file_of: Callable[[str, str], Path], feed: Callable[..., dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    unet, given, sizes = OnnxDenoiser(file_of("W4A6", "onnxruntime"), threads=1), feed(4), list[int]()
    given["timestep"] = torch.tensor([7.0, 900.0, 7.0, 7.0])
    alone = torch.cat([unet(**{k: v[i : i + 1] for k, v in given.items()}).sample for i in range(4)])
    run = unet._run
    monkeypatch.setattr(unet, "_run", lambda feed: (sizes.append(len(feed["sample"])), run(feed))[1])
    torch.testing.assert_close(unet(**given).sample, alone)
    assert sizes == [3, 1]


class Shortcut(nn.Module):
    """A transposed convolution of two joined tensors; returns a bare tensor where a tuple is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inside, self.last = nn.Conv2d(2, 6, 1), nn.Conv2d(6, 4, 1), nn.Conv2d(3, 2, 1)
        self.up = nn.ConvTranspose2d(10, 3, 2, stride=2)

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = True) -> Any:
        """sample [B, 2, H, W]."""
        x = self.first(sample) + timestep[:, None, None, None] / 1000
        y = self.last(self.up(torch.cat([x, self.inside(x.tanh())], 1)).tanh())
        return BaseOutput(sample=y) if return_dict else y


@torch.no_grad()
def test_ranges_of_a_transposed_convolution_and_a_bare_tensor_in_the_place_of_a_tuple(
    tmp_path: Path, quantize_model: Callable[..., tuple[Artifact, Calls]]
) -> None:
    torch.manual_seed(0)
    x, t = torch.randn(3, 2, 4, 4), torch.tensor([900.0, 100.0, 400.0])
    artifact, calls = quantize_model(Shortcut(), sample=x, timestep=t)
    assert next(layer for layer in artifact.layers if layer.name == "up").splits == (0, 6, 10)
    export_onnx(artifact, tmp_path / "model.onnx", "portable", calls, model=Shortcut())
    graph, simulated = OnnxDenoiser(tmp_path / "model.onnx", threads=1), build_quantized(artifact, Shortcut())
    expected = simulated(x, t, return_dict=False)
    for got in (graph(x, t).sample, graph(x, t)[0], graph(x, t, return_dict=False)):
        assert got.shape == (3, 2, 8, 8)
        assert sqnr_db(expected, got) > 30


class Beside(Own):
    """Gives more than what it predicts: in half precision, with the samples in the last axis, of none, of all."""

    def __init__(self, of_all: bool) -> None:
        super().__init__()
        self.of_all = of_all

    def forward(self, sample: Tensor, timestep: Tensor) -> Any:
        y = super().forward(sample, timestep)
        return y, y.mean(1).bfloat16(), y.mean(1).T, self.last.bias * 1, *([y.mean()] if self.of_all else [])


@needs_wide_sums
@torch.no_grad()
@pytest.mark.parametrize("of_all", [False, True])
def test_results_need_not_have_samples_first(
    of_all: bool, tmp_path: Path, quantize_model: Callable[..., tuple[Artifact, Calls]]
) -> None:
    torch.manual_seed(0)
    x, t = torch.randn(4, 3, 4), torch.tensor([900.0, 100.0, 400.0, 100.0])
    artifact, calls = quantize_model(Beside(of_all), sample=x, timestep=t)
    export_onnx(artifact, tmp_path / "model.onnx", "onnxruntime", calls, model=Beside(of_all))
    graph, simulated = OnnxDenoiser(tmp_path / "model.onnx", threads=1), build_quantized(artifact, Beside(of_all))
    if of_all:
        with pytest.raises(ModelError, match="gives one out_4 for all samples"):
            graph(x, t)
    steps = t[:1].expand(4) if of_all else t
    found, expected = graph(x, steps), simulated(x, steps)
    assert [y.shape for y in found] == [y.shape for y in expected]
    assert min(sqnr_db(b[None].float(), a[None]) for a, b in zip(found, expected, strict=True)) > 40


class Wrapper(Own):
    """Has the argument that pipelines pass, and returns what it likes."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = True) -> Any:
        y = super().forward(sample, timestep)
        return {"tuple": (y,), "list": [y], "dict": {"sample": y}}[self.kind]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["tuple", "list", "dict"])
def test_a_wrapper_may_return_the_same_whatever_return_dict_says(
    kind: str, tmp_path: Path, quantize_model: Callable[..., tuple[Artifact, Calls]]
) -> None:
    torch.manual_seed(0)
    x, t = torch.randn(2, 3, 4), torch.tensor([900.0, 100.0])
    artifact, calls = quantize_model(Wrapper(kind), sample=x, timestep=t)
    export_onnx(artifact, tmp_path / "model.onnx", "portable", calls, model=Wrapper(kind))
    graph, expected = OnnxDenoiser(tmp_path / "model.onnx", threads=1), build_quantized(artifact, Wrapper(kind))(x, t)
    place: Any = "sample" if kind == "dict" else 0
    for found in (graph(x, t), graph(x, t, return_dict=False)):
        assert isinstance(found, type(expected))
        assert sqnr_db(expected[place], found[place]) > 40


class Moments(NamedTuple):
    mean: Tensor
    variance: Tensor


class Learned(Own):
    """Predicts a variance too, under names."""

    def forward(self, sample: Tensor, timestep: Tensor) -> Any:
        mean = super().forward(sample, timestep)
        return Moments(mean, mean.square())


@torch.no_grad()
def test_items_of_a_tuple_keep_their_names(
    tmp_path: Path, quantize_model: Callable[..., tuple[Artifact, Calls]]
) -> None:
    torch.manual_seed(0)
    x, t = torch.randn(2, 3, 4), torch.tensor([900.0, 100.0])
    artifact, calls = quantize_model(Learned(), sample=x, timestep=t)
    export_onnx(artifact, tmp_path / "model.onnx", "portable", calls, model=Learned())
    mean, variance = found = OnnxDenoiser(tmp_path / "model.onnx", threads=1)(x, t)
    assert found.mean is mean and found.variance is variance
    assert sqnr_db(build_quantized(artifact, Learned())(x, t).variance, variance) > 40


class Starred(TokensFirst):
    """Takes whatever it is given, and uses none of it."""

    def forward(self, sample: Tensor, timestep: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(sample, timestep)


@torch.no_grad()
def test_unnamed_arguments_that_no_call_has_need_not_be_given(
    tmp_path: Path, quantize_model: Callable[..., tuple[Artifact, Calls]]
) -> None:
    torch.manual_seed(0)
    x, t = torch.randn(2, 3, 4), torch.tensor([900.0, 100.0])
    artifact, calls = quantize_model(Starred(), sample=x, timestep=t)
    export_onnx(artifact, tmp_path / "model.onnx", "portable", calls, model=Starred())
    graph = OnnxDenoiser(tmp_path / "model.onnx", threads=1)
    assert sqnr_db(build_quantized(artifact, Starred())(x, t), graph(x, t)) > 40
    with pytest.raises(ModelError, match="The graph takes no args; export it with calls that have one"):
        graph(x, t, x)


class Shift(NamedTuple):
    """Arguments of one name."""

    by: Tensor
    times: float


class LabelsFirst(nn.Module):
    """Its first argument holds whole numbers, its last one is a tuple whose items have names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, label: Tensor, sample: Tensor, timestep: Tensor, shift: Shift) -> tuple[Tensor, Tensor]:
        """sample [B, N, 4]."""
        y = self.first(sample + shift.by * shift.times) + (label + timestep / 1000)[:, None, None]
        return self.last(y.tanh()), label + 1


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_real_results_have_the_dtype_of_real_arguments(
    dtype: torch.dtype, tmp_path: Path, quantize_model: Callable[..., tuple[Artifact, Calls]]
) -> None:
    torch.manual_seed(0)
    given = {"label": torch.tensor([1, 2]), "sample": torch.randn(2, 3, 4), "timestep": torch.tensor([900.0, 100.0])}
    given["shift"] = Shift(torch.randn(2, 3, 4), 0.5)  # type: ignore[assignment]
    artifact, calls = quantize_model(LabelsFirst(), **given)
    export_onnx(artifact, tmp_path / "model.onnx", "portable", calls, model=LabelsFirst())
    graph, simulated = OnnxDenoiser(tmp_path / "model.onnx", threads=1), build_quantized(artifact, LabelsFirst())
    expected, found = simulated(**given), graph(**{**given, "sample": given["sample"].to(dtype)})
    assert sqnr_db(expected[0], found[0]) > 40
    assert found[0].dtype == dtype
    assert torch.equal(expected[1], found[1])


@torch.no_grad()
def test_what_a_file_says_of_itself_is_believed_only_where_it_is_true(
    file_of: Callable[[str, str], Path], feed: Callable[..., dict[str, Tensor]]
) -> None:
    """Whatever somebody writes there, it is refused in one sentence or does no harm."""
    path, refused = file_of("W8A8-symmetric", "portable"), 0
    model = onnx.load(path)
    (entry,) = [entry for entry in model.metadata_props if entry.key == METADATA]
    said = json.loads(entry.value)
    for case in range(60):
        rng = random.Random(case)
        part = rng.choice(("call", "call", "time_axis", None))
        entry.value = json.dumps({**said, part: changed_json(said[part], rng)} if part else changed_json(said, rng))
        onnx.save(model, path)
        try:
            OnnxDenoiser(path, threads=1)(**feed())
        except PtqTdqError as error:
            assert len(str(error).splitlines()) == 1
            refused += 1
    assert 0 < refused < 60
