"""Small randomly initialised denoisers of diffusers with the arguments that their own pipelines pass."""

from denoisers.images import IMAGES
from denoisers.table import Denoiser, prediction
from denoisers.unets import UNETS

DENOISERS: tuple[Denoiser, ...] = (*UNETS, *IMAGES)

__all__ = ["DENOISERS", "Denoiser", "prediction"]
