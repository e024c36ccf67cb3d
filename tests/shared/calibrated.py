"""Small pipelines, calibrated in the quickest way, and what each of them draws."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from pipelines import SmallPipeline
from torch import Tensor

from ptq_tdq import load_quantized, preset

QUICK = preset(
    "default",
    scheme="W8A8",
    method="step-table",
    rounding="nearest",
    round_again=False,
    activation_iterations=0,
    weight_range="minmax",
    activation_range="minmax",
    samples_per_step=2,
    calibration_steps=2,
    num_inference_steps=2,
)
CONDITIONS: dict[str | None, dict[str, Any]] = {
    "prompt": {"prompt": "A red fox"},
    "class_labels": {"class_labels": [1]},
    None: {},
}


@dataclass(frozen=True)
class Calibrated:
    """A small pipeline in ``full`` precision, the ``artifact`` of its denoiser, and what it draws with it."""

    entry: SmallPipeline
    full: Path
    artifact: Path
    drawn: Tensor

    def pipe(self) -> Any:
        """The pipeline in full precision."""
        return copy.deepcopy(_once(self.full))

    def quantized(self) -> Any:
        """The pipeline with the artifact's denoiser."""
        pipe = self.pipe()
        setattr(pipe, self.entry.denoiser, load_quantized(self.artifact))
        return pipe

    def denoiser(self, pipe: Any) -> Any:
        return getattr(pipe, self.entry.denoiser)

    def draw(self, pipe: Any, **options: Any) -> Tensor:
        return draw(self.entry, pipe, **options)


@cache
def _once(folder: Path) -> Any:
    return load(folder)


def load(folder: Path, **options: Any) -> Any:
    pipe = DiffusionPipeline.from_pretrained(folder, local_files_only=True, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(entry: SmallPipeline, pipe: Any, **options: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    arguments = CONDITIONS[entry.condition] | entry.call | options
    return torch.as_tensor(pipe(**arguments, generator=generator, return_dict=False)[0])
