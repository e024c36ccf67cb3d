"""An exported file in a diffusers pipeline."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from processors import needs_wide_sums
from torch import Tensor, nn

from ptq_tdq.artifacts import Artifact
from ptq_tdq.calib_data import sample_latents
from ptq_tdq.errors import ModelError, TimestepError, UsageError
from ptq_tdq.evaluate.metrics import sqnr_db
from ptq_tdq.export.onnx import OnnxUNet
from ptq_tdq.load import build_quantized

RUNTIMES = ("onnxruntime", "openvino")


@pytest.fixture
def file_of(tmp_path: Path, encode: Callable[[str, str], bytes]) -> Callable[[str, str], Path]:
    def write(case: str, runtime: str) -> Path:
        path = tmp_path / f"{case}.{runtime}.onnx"
        path.write_bytes(encode(case, runtime))
        return path

    return write


@needs_wide_sums
@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("scheduler", [DDIMScheduler(), EulerDiscreteScheduler()], ids=["integer-t", "fractional-t"])
def test_it_samples_as_the_simulated_model_does(
    runtime: str, scheduler: Any, file_of: Callable[[str, str], Path], artifact_of: Callable[[str], Artifact]
) -> None:
    """At each step from the same x_t; a tie that falls the other way grows over the steps of a random model."""
    simulated = build_quantized(artifact_of("W8A8-symmetric"))
    unet = OnnxUNet(file_of("W8A8-symmetric", runtime), threads=1)
    assert unet.runtime == runtime
    ratios: list[float] = []

    class Both(nn.Module):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            expected, got = simulated(*args, **kwargs), unet(*args, **kwargs)
            ratios.append(sqnr_db(expected[0], got[0]))
            return got

    noise, labels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2)), torch.tensor([2, 0])
    sample_latents(Both(), scheduler, noise=noise, num_inference_steps=10, class_labels=labels)
    assert len(ratios) == 10
    assert min(ratios) > 25


@needs_wide_sums
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_other_batches_and_sizes(
    runtime: str,
    file_of: Callable[[str, str], Path],
    artifact_of: Callable[[str], Artifact],
    feed: Callable[..., dict[str, Tensor]],
) -> None:
    simulated = build_quantized(artifact_of("W8A8-affine"))
    unet = OnnxUNet(file_of("W8A8-affine", runtime), threads=1)
    for batch, size in ((1, (8, 8)), (3, (12, 16))):
        given = feed(batch, size)
        expected = simulated(**given).sample
        assert sqnr_db(expected, unet(**given).sample) > 25
        assert sqnr_db(expected, unet(*given.values(), return_dict=False)[0]) > 25


def test_one_t_serves_the_whole_batch(
    file_of: Callable[[str, str], Path], feed: Callable[..., dict[str, Tensor]]
) -> None:
    unet, given = OnnxUNet(file_of("W4A6", "onnxruntime"), threads=1), feed(3)
    each = unet(given["sample"], torch.full((3,), 640), given["class_labels"]).sample
    for t in (640, 640.0, torch.tensor(640), torch.tensor([640])):
        torch.testing.assert_close(unet(given["sample"], t, given["class_labels"]).sample, each, rtol=0, atol=0)


def test_it_is_what_a_pipeline_asks_for(
    file_of: Callable[[str, str], Path], artifact_of: Callable[[str], Artifact]
) -> None:
    unet = OnnxUNet(file_of("W4A6", "onnxruntime"), threads=1)
    assert (unet.config.in_channels, unet.config.sample_size, unet.dtype) == (3, 8, torch.float32)
    assert unet.device == torch.device("cpu")
    assert unet.facts["scheme"] == "W4A6"


@pytest.mark.parametrize("t", [-1, 1000, float("nan")])
def test_a_time_step_outside_the_tables_is_an_error(t: float, file_of: Callable[[str, str], Path]) -> None:
    unet = OnnxUNet(file_of("W4A6", "onnxruntime"), threads=1)
    with pytest.raises(TimestepError, match=r"cover the time steps 0 to 999\. Got t ="):
        unet(torch.zeros(1, 3, 8, 8), t, torch.tensor([0]))


def test_a_portable_file_runs_on_both(
    file_of: Callable[[str, str], Path], feed: Callable[..., dict[str, Tensor]]
) -> None:
    path, given = file_of("W8A8-symmetric", "portable"), feed(2)
    first = OnnxUNet(path, threads=1)
    second = OnnxUNet(path, runtime="openvino", threads=1)
    assert (first.runtime, second.runtime) == ("onnxruntime", "openvino")
    assert sqnr_db(first(**given).sample, second(**given).sample) > 25


def test_files_that_cannot_be_run(tmp_path: Path, file_of: Callable[[str, str], Path]) -> None:
    (tmp_path / "text.onnx").write_text("not a graph")
    with pytest.raises(ModelError, match=r"not an ONNX file that `ptq-tdq export` has written"):
        OnnxUNet(tmp_path / "text.onnx")
    with pytest.raises(ModelError, match="cannot be read"):
        OnnxUNet(tmp_path / "absent.onnx")
    with pytest.raises(ModelError, match="was exported for onnxruntime; export it for openvino"):
        OnnxUNet(file_of("W4A6", "onnxruntime"), runtime="openvino")
    with pytest.raises(UsageError, match=r"must be one of onnxruntime, openvino\. Got 'tensorrt' instead"):
        OnnxUNet(file_of("W4A6", "portable"), runtime="tensorrt")


def test_wrong_labels_reach_the_user(file_of: Callable[[str, str], Path]) -> None:
    unet = OnnxUNet(file_of("W4A6", "onnxruntime"), threads=1)
    with pytest.raises(ModelError, match="class_labels"):
        unet(torch.zeros(1, 3, 8, 8), 0)


def test_results_belong_to_the_caller(
    file_of: Callable[[str, str], Path], feed: Callable[..., dict[str, Tensor]]
) -> None:
    unet, given = OnnxUNet(file_of("W4A6", "openvino"), threads=1), feed(2)
    first = unet(**given).sample
    before = first.clone()
    unet(-given["sample"], given["timestep"], given["class_labels"])
    np.testing.assert_array_equal(first, before)
