"""The models that come with the package: class-conditional or not, on latents or on pixels, all of 32x32 CIFAR-10."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ptq_tdq.calib_data.reference import reference_path
from ptq_tdq.calib_data.reference_dit import reference_dit_path
from ptq_tdq.calib_data.reference_pixel import reference_pixel_path


@dataclass(frozen=True)
class Embedded:
    """``id`` is what artifacts and results call it, ``folder`` holds its denoiser and scheduler, ``vae`` its VAE."""

    id: str
    folder: Path
    vae: Path | None


_VAE = reference_path() / "vae"
EMBEDDED = {
    "reference": Embedded("ptq-tdq/reference-cifar10-ldm", reference_path(), _VAE),
    "reference-dit": Embedded("ptq-tdq/reference-cifar10-dit", reference_dit_path(), _VAE),
    "reference-pixel": Embedded("ptq-tdq/reference-cifar10-ddim", reference_pixel_path(), None),
}
"""By the name that ``--model`` takes."""


def find_embedded(model_id: str) -> Embedded | None:
    """The embedded model of this id, or whose folder this is."""
    folder = os.path.realpath(model_id) if model_id and "\0" not in model_id else None
    return next((e for e in EMBEDDED.values() if e.id == model_id or os.path.realpath(e.folder) == folder), None)
