"""One table from a class of diffusers to what computes in its place, fused, and how a model is gone through with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import Timesteps
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn

from ptq_tdq.modules.products import products_of
from ptq_tdq.runtime.blocks import (
    Fused,
    FusedAttention,
    FusedChain,
    FusedOutput,
    FusedResnet,
    FusedTimesteps,
    FusedUpsample,
    TimeProjections,
)
from ptq_tdq.runtime.layer import WeightOnlyLayer
from ptq_tdq.runtime.token_blocks import FusedTransformer

FUSED: dict[type[nn.Module], Callable[[Any], Fused | None]] = {
    ResnetBlock2D: FusedResnet.of,
    Upsample2D: FusedUpsample.of,
    Attention: FusedAttention.of,
    BasicTransformerBlock: FusedTransformer.of,
    FeedForward: FusedChain.of,
    nn.Sequential: FusedChain.of,
    Timesteps: FusedTimesteps,
}


def fuse(model: nn.Module) -> list[str]:
    """Give the blocks that are covered their fused form; returns their names."""
    done: dict[str, Fused] = {}
    for name, module in model.named_modules():
        listens = bool(products_of(module))  # by a class that is made of its own
        make = FUSED.get(type(module).__mro__[listens])
        fused = make(module) if make else None
        if fused is not None:
            module.__dict__["forward"] = fused  # before the class's own
            done[name] = fused
    for fused in done.values():
        fused.seal()
    resnets = [fused for fused in done.values() if isinstance(fused, FusedResnet)]
    for module in model.modules() if resnets else ():
        if isinstance(module, WeightOnlyLayer):
            module.to_rows = True
    output = [FusedOutput.places[-1]] if FusedOutput.of(model) else []
    return [*done, *output, *_fuse_time(resnets)]


def _fuse_time(resnets: list[FusedResnet]) -> list[str]:
    """The weight-only time-embedding linears of the residual blocks."""
    blocks = [fused for fused in resnets if isinstance(fused.block.time_emb_proj, WeightOnlyLayer)]
    alike = {(fused.block.time_emb_proj.codes.shape[1], fused.block.time_emb_proj.codes.dtype) for fused in blocks}
    if len(blocks) < 2 or len(alike) > 1:
        return []
    together = TimeProjections([fused.block.time_emb_proj for fused in blocks])
    for index, fused in enumerate(blocks):
        fused.projections = together, index
    return ["time projections"]
