"""Sample pictures with an exported ONNX file in the place of a pipeline's denoiser.

    ptq-tdq export out --format onnx --runtime onnxruntime --output denoiser.onnx
    python examples/onnx_pipeline.py denoiser.onnx FOLDER_OR_HUB_ID --call num_inference_steps=25 --output-dir samples

``--call KEY=VALUE`` is an argument of the pipeline's call (``prompt="a red fox"``, ``batch_size=4``). The folder is a
saved pipeline, with a ``model_index.json``; the models that come with ptq-tdq are denoisers alone. On processors
without VNNI take ``--runtime portable``.
"""

from __future__ import annotations

import argparse
import ast
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from ptq_tdq.export.onnx import OnnxDenoiser


def argument(text: str) -> tuple[str, Any]:
    """A name and a value: a number or another literal of Python, else text."""
    name, _, value = text.partition("=")
    try:
        return name, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return name, value


def main(arguments: list[str] | None = None) -> None:
    """Sample and write the pictures."""
    parser = argparse.ArgumentParser(description="Sample with an exported ONNX file.")
    parser.add_argument("file", type=Path, help="what `ptq-tdq export --format onnx` has written")
    parser.add_argument("pipeline", help="the full-precision pipeline, for all that is around its denoiser")
    parser.add_argument("--component", default="unet", help="the denoiser's name in the pipeline")
    parser.add_argument("--call", type=argument, action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output-dir", type=Path, default=Path("samples"))
    given = parser.parse_args(arguments)

    pipe = DiffusionPipeline.from_pretrained(given.pipeline)
    setattr(pipe, given.component, OnnxDenoiser(given.file))
    images = pipe(generator=torch.manual_seed(given.seed), **dict(given.call)).images
    given.output_dir.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images):
        image.save(given.output_dir / f"{number}.png")
    print(f"Wrote {len(images)} pictures to {given.output_dir}")


if __name__ == "__main__":
    main()
