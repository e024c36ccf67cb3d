"""Sample with an exported ONNX file in a diffusers pipeline.

    ptq-tdq export out --format onnx --runtime onnxruntime --output unet.onnx
    python examples/onnx_pipeline.py unet.onnx --model FOLDER_OR_HUB_ID --output samples.png

With an unconditional pixel-space pipeline (``google/ddpm-cifar10-32``) that is all there is to it:

    pipe = DDIMPipeline.from_pretrained("google/ddpm-cifar10-32")
    pipe.unet = OnnxUNet("unet.onnx")

This script also samples the embedded model (without ``--model``), which has classes and a VAE that DDIMPipeline does
not know of.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from ptq_tdq import load_model
from ptq_tdq.calib_data import sample_latents
from ptq_tdq.evaluate.images import decode, grid
from ptq_tdq.export.onnx import OnnxUNet


def main(arguments: list[str] | None = None) -> None:
    """Sample and write the picture."""
    parser = argparse.ArgumentParser(description="Sample with an exported ONNX file.")
    parser.add_argument("file", type=Path, help="what `ptq-tdq export --format onnx` has written")
    parser.add_argument("--model", help="the original, for its scheduler and VAE (default: the embedded model)")
    parser.add_argument("--output", type=Path, default=Path("samples.png"), help="the picture to write")
    parser.add_argument("--num-images", type=int, default=20)
    parser.add_argument("--num-inference-steps", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)

    unet, model = OnnxUNet(given.file), load_model(given.model)
    config = unet.config
    side = (config.sample_size,) * 2 if isinstance(config.sample_size, int) else tuple(config.sample_size)
    noise = torch.randn(given.num_images, config.in_channels, *side, generator=torch.manual_seed(given.seed))
    latents = sample_latents(
        unet,
        model.scheduler,
        noise=noise,
        num_inference_steps=given.num_inference_steps,
        class_labels=torch.arange(given.num_images) % model.num_classes if model.num_classes else None,
    )
    title = f"{unet.facts['scheme']} on {unet.runtime}"
    grid({title: decode(model, latents)}, columns=model.num_classes or 5).save(given.output)
    print(f"Wrote {given.output}")


if __name__ == "__main__":
    main()
