"""Sample with an exported ONNX file in the model's own pipeline.

    ptq-tdq export out --format onnx --output denoiser.onnx
    python examples/onnx_pipeline.py denoiser.onnx --model FOLDER_OR_HUB_ID --output samples.png

In a pipeline of one's own, that is all there is to it:

    pipe = StableDiffusionPipeline.from_pretrained("...")
    pipe.unet = OnnxDenoiser("denoiser.onnx")

Without ``--model`` this script samples the embedded model.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ptq_tdq import load_model
from ptq_tdq.evaluate.images import captions_of, count_classes, grid_png
from ptq_tdq.evaluate.trajectories import run
from ptq_tdq.export.onnx import OnnxDenoiser


def main(arguments: list[str] | None = None) -> None:
    """Sample and write the picture."""
    parser = argparse.ArgumentParser(description="Sample with an exported ONNX file.")
    parser.add_argument("file", type=Path, help="what `ptq-tdq export --format onnx` has written")
    parser.add_argument("--model", help="the original, for all that is around its denoiser (default: the embedded one)")
    parser.add_argument("--output", type=Path, default=Path("samples.png"), help="the picture to write")
    parser.add_argument("--num-images", type=int, default=20)
    parser.add_argument("--num-inference-steps", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)

    denoiser, model = OnnxDenoiser(given.file), load_model(given.model)
    conditions = model.sampler.conditions(given.num_images)
    images = run(denoiser, model, conditions, given.num_inference_steps, given.seed).images
    if images is None:
        raise SystemExit("The model's samples are no images.")
    title = f"{denoiser.facts['scheme']} on {denoiser.runtime}"
    given.output.write_bytes(grid_png({title: images}, count_classes(conditions), captions=captions_of(conditions)))
    print(f"Wrote {given.output}")


if __name__ == "__main__":
    main()
