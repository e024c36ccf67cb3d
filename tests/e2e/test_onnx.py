"""`ptq-tdq export --format onnx` of a calibrated model, and pipelines of diffusers around the file."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DiffusionPipeline
from PIL import Image
from pipelines import PIPELINES

from ptq_tdq import calibrate, load_quantized, preset
from ptq_tdq.calib_data import collect, load_model
from ptq_tdq.cli.export import RUNTIMES
from ptq_tdq.evaluate.metrics import sqnr_db
from ptq_tdq.export.onnx import FORMS, OnnxDenoiser
from ptq_tdq.export.onnx.runtimes import QDQ

QUICK = (
    *("--samples-per-step", "2", "--calibration-steps", "2", "--num-inference-steps", "3", "--evaluation-samples", "0"),
    *("--set", "activation_iterations=2", "--set", "activation_range=minmax", "--set", "weight_range=minmax"),
    *("--set", "rounding=nearest", "--threads", "1"),
)


def test_a_pipeline_samples_with_the_exported_file(
    cli: Callable[..., Any], pipeline: Path, calibrated: Callable[[Path], Path], tmp_path: Path
) -> None:
    file = tmp_path / "unet.onnx"
    result = cli("export", calibrated(pipeline), "--format", "onnx", "--output", file)
    assert (result.code, result.out) == (0, "")
    assert result.err.splitlines()[1:] == [f"Wrote {file}"]
    onnx.checker.check_model(file, full_check=True)
    pipe = DDIMPipeline(unet=OnnxDenoiser(file, threads=1), scheduler=DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    images = pipe(batch_size=2, num_inference_steps=5, generator=torch.manual_seed(0), output_type="np").images
    assert images.shape == (2, 8, 8, 3)
    assert float(images.std()) > 0

    example = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "onnx_pipeline.py"))
    options = ("--call", "batch_size=2", "--call", "num_inference_steps=3", "--output-dir", str(tmp_path / "samples"))
    example["main"]([str(file), str(pipeline), *options])
    for number in range(2):
        with Image.open(tmp_path / "samples" / f"{number}.png") as opened:
            assert opened.format == "PNG" and opened.size == (8, 8)

    one = {"samples_per_step": 1, "calibration_steps": 1, "num_inference_steps": 2}
    collect(load_model(str(pipeline)), **one).save(tmp_path / "calls.safetensors")
    again = ("--calls", tmp_path / "calls.safetensors", "--output", tmp_path / "again.onnx")
    assert cli("export", calibrated(pipeline), "--format", "onnx", *again).code == 0
    assert (tmp_path / "again.onnx").read_bytes() == file.read_bytes()


def test_a_prompt_and_guidance_reach_the_file(cli: Callable[..., Any], tmp_path: Path) -> None:
    entry = next(entry for entry in PIPELINES if entry.name == "StableDiffusionXLPipeline")
    entry.save(tmp_path / "model")
    given = {key: value for key, value in entry.call.items() if key not in ("num_inference_steps", "output_type")}
    flags = [word for key, value in given.items() for word in ("--call", f"{key}={value}")]
    result = cli("calibrate", "--model", tmp_path / "model", "--output-dir", tmp_path / "out", *flags, *QUICK)
    assert result.code == 0, result.err
    file = tmp_path / "unet.onnx"
    result = cli("export", tmp_path / "out", "--format", "onnx", "--output", file)
    assert result.code == 0, result.err
    graph, simulated = OnnxDenoiser(file, threads=1), load_quantized(tmp_path / "out")
    ratios: list[float] = []

    class Both(OnnxDenoiser):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            expected = simulated(*args, **kwargs)
            ratios.append(sqnr_db(expected[0], graph(*args, **kwargs)[0]))
            return expected

    pipe = DiffusionPipeline.from_pretrained(tmp_path / "model", local_files_only=True)
    pipe.unet = Both(file, threads=1)  # which the pipeline asks for the width of a layer
    pipe.set_progress_bar_config(disable=True)
    pipe(prompt=["A red fox", "A boat"], **entry.call, generator=torch.Generator().manual_seed(0))
    assert len(ratios) == entry.call["num_inference_steps"]
    assert min(ratios) > 25


def test_graphs_of_each_step_of_recorded_calls_need_a_number(
    cli: Callable[..., Any], pipeline: Path, tmp_path: Path
) -> None:
    model = load_model(str(pipeline))
    calls = replace(collect(model, samples_per_step=1, calibration_steps=2, num_inference_steps=2), recipe={})
    config = preset(scheme="W8A8", activation_iterations=0, rounding="nearest")
    calibrate(model, config, calls).save_pretrained(tmp_path / "artifact")
    given = (tmp_path / "artifact", "--format", "onnx", "--runtime", "qdq", "--output", tmp_path / "graphs")
    found = cli("export", *given)
    assert found.code == 2 and "give --steps, or the calls themselves" in found.err


def test_graphs_of_steps_with_outputs_in_eight_bits(
    cli: Callable[..., Any], pipeline: Path, calibrated: Callable[[Path], Path], tmp_path: Path
) -> None:
    given = ("--format", "onnx", "--runtime", "qdq", "--steps", "3", "--int8-outputs", "--output", tmp_path / "graphs")
    found = cli("export", calibrated(pipeline), *given)
    assert found.code == 0, found.err
    pipe = DDIMPipeline(unet=OnnxDenoiser(tmp_path / "graphs", threads=1), scheduler=DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    images = pipe(batch_size=2, num_inference_steps=3, generator=torch.manual_seed(0), output_type="np").images
    assert images.shape == (2, 8, 8, 3)


def test_the_command_knows_all_runtimes() -> None:
    assert (*FORMS, QDQ) == RUNTIMES


def test_calls_that_are_not_there(
    cli: Callable[..., Any], pipeline: Path, calibrated: Callable[[Path], Path], tmp_path: Path
) -> None:
    absent = tmp_path / "absent.safetensors"
    result = cli(
        *("export", calibrated(pipeline), "--format", "onnx"), "--calls", absent, "--output", tmp_path / "x.onnx"
    )
    assert result.code == 1
    assert result.err == f"Error: There is no calibration set at '{absent}'; check the path.\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--runtime", "openvino"), "--runtime goes with --format onnx. Got --format csv instead."),
        (
            ("--format", "onnx", "--int8-outputs"),
            "--int8-outputs goes with --runtime qdq; the other graphs have outputs in floating point.",
        ),
    ],
)
def test_options_belong_to_a_kind_of_graph(
    flags: tuple[str, ...],
    said: str,
    cli: Callable[..., Any],
    pipeline: Path,
    calibrated: Callable[[Path], Path],
    tmp_path: Path,
) -> None:
    result = cli("export", calibrated(pipeline), *flags, "--output", tmp_path / "out")
    assert (result.code, result.err) == (2, f"Error: {said}\n")
    assert list(tmp_path.iterdir()) == []
