"""`ptq-tdq export --format onnx` of a calibrated model, and a diffusers pipeline around the file."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import torch
from diffusers import DDIMPipeline, DDIMScheduler
from PIL import Image

from ptq_tdq.cli.export import RUNTIMES
from ptq_tdq.export.onnx import FORMS, OnnxUNet


def test_a_pipeline_samples_with_the_exported_file(
    cli: Callable[..., Any], pipeline: Path, calibrated: Callable[[Path], Path], tmp_path: Path
) -> None:
    file = tmp_path / "unet.onnx"
    result = cli("export", calibrated(pipeline), "--format", "onnx", "--runtime", "onnxruntime", "--output", file)
    assert (result.code, result.out) == (0, "")
    assert result.err.splitlines()[1:] == [f"Wrote {file}"]
    onnx.checker.check_model(file, full_check=True)
    pipe = DDIMPipeline(unet=OnnxUNet(file, threads=1), scheduler=DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    images = pipe(batch_size=2, num_inference_steps=5, generator=torch.manual_seed(0), output_type="np").images
    assert images.shape == (2, 8, 8, 3)
    assert float(images.std()) > 0

    example = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "onnx_pipeline.py"))
    picture = tmp_path / "samples.png"
    options = ("--num-images", "2", "--num-inference-steps", "3")
    example["main"]([str(file), "--model", str(pipeline), "--output", str(picture), *options])
    with Image.open(picture) as opened:
        assert opened.format == "PNG"


def test_the_command_knows_all_runtimes() -> None:
    assert tuple(FORMS) == RUNTIMES


def test_a_runtime_belongs_to_a_graph(
    cli: Callable[..., Any], pipeline: Path, calibrated: Callable[[Path], Path], tmp_path: Path
) -> None:
    result = cli("export", calibrated(pipeline), "--runtime", "openvino", "--output", tmp_path / "tables.csv")
    assert result.code == 2
    assert result.err == "Error: --runtime goes with --format onnx. Got --format csv instead.\n"
    assert list(tmp_path.iterdir()) == []
