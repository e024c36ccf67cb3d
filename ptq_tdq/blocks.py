"""Which modules are reconstructed as one unit: one table of classes; every other quantized layer is a unit alone."""

from __future__ import annotations

from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

UNITS: tuple[type[nn.Module], ...] = (ResnetBlock2D, BasicTransformerBlock, Attention)


def unit_of(model: nn.Module, name: str) -> str:
    """The name of the outermost unit that holds module ``name``, or ``name`` itself."""
    path = name.split(".")
    prefixes = (".".join(path[: i + 1]) for i in range(len(path)))
    return next((p for p in prefixes if isinstance(model.get_submodule(p), UNITS)), name)
