"""The blocks of a U-Net with their passes fused: norms go into the quantizers, residual sums into the products.

One table from a diffusers class to what stands in its place; a block of another form stays as it is, and its layers run
in integers one by one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from ptq_tdq.records import LayerRecord
from ptq_tdq.runtime.attention import Attend, reference_attend
from ptq_tdq.runtime.kernels import Norm
from ptq_tdq.runtime.layer import IntegerLayer, WeightOnlyLayer
from ptq_tdq.runtime.step import Interval, Step


def norm_of(module: nn.Module, *, silu: bool) -> Norm | None:
    """The group norm as data, or None for another kind of norm."""
    if not isinstance(module, nn.GroupNorm) or module.weight is None:
        return None
    weight, bias = (p.detach().float().contiguous() for p in (module.weight, module.bias))
    return Norm(int(module.num_groups), weight, bias, module.eps, silu)


def _takes_norm(layer: nn.Module | None) -> bool:
    return isinstance(layer, IntegerLayer) and len(layer.parts) == 1


class TimeProjections(nn.Module):
    """The time-embedding linears of all residual blocks as one; computed when the first of them asks."""

    def __init__(self, linears: list[WeightOnlyLayer]) -> None:
        super().__init__()
        self.sizes = [len(linear.codes) for linear in linears]
        parts = ([getattr(linear, name) for linear in linears] for name in ("codes", "scale", "bias"))
        codes, scale, bias = (torch.cat(part) for part in parts)
        self.all = WeightOnlyLayer(codes, scale, bias)
        self._last: Tensor | None = None
        self._shifts: tuple[Tensor, ...] = ()

    def forward(self, temb: Tensor, index: int) -> Tensor:
        """temb [B, E] -> the shift [B, C] of block ``index``."""
        if temb is not self._last:
            self._last, self._shifts = temb, self.all(nn.functional.silu(temb)).split(self.sizes, 1)
        return self._shifts[index]


class IntegerResnet(nn.Module):
    """ResnetBlock2D: ``conv2(silu(norm2(conv1(silu(norm1(x))) + temb))) + shortcut(x)``."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv_shortcut = block.conv1, block.conv2, block.conv_shortcut
        self.time_emb_proj, self.factor = block.time_emb_proj, float(block.output_scale_factor)
        self.shift: Callable[[Tensor], Tensor | None] = self._own_shift
        self.conv1.norm, self.conv2.norm = norm_of(block.norm1, silu=True), norm_of(block.norm2, silu=True)

    @staticmethod
    def of(block: Any) -> IntegerResnet | None:
        covered = (
            all(_takes_norm(conv) for conv in (block.conv1, block.conv2))
            and all(norm_of(norm, silu=True) for norm in (block.norm1, block.norm2))
            and isinstance(block.nonlinearity, nn.SiLU)
            and (block.upsample is None and block.downsample is None)
            and (block.time_emb_proj is None or block.time_embedding_norm == "default")
        )
        return IntegerResnet(block) if covered else None

    def forward(self, x: Tensor, temb: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        shift = None if temb is None else self.shift(temb)
        # a copy, since the sum takes its place and x may be wanted again as a skip connection
        residual = x.clone(memory_format=torch.channels_last) if self.conv_shortcut is None else self.conv_shortcut(x)
        y: Tensor = self.conv2.run(self.conv1.run(x), shift=shift, onto=residual)
        return y if self.factor == 1 else y / self.factor

    def _own_shift(self, temb: Tensor) -> Tensor | None:
        return None if self.time_emb_proj is None else self.time_emb_proj(nn.functional.silu(temb))


class IntegerUpsample(nn.Module):
    """Upsample2D by nearest neighbours and a convolution: codes are enlarged, not numbers."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.conv = block.conv

    @staticmethod
    def of(block: Any) -> IntegerUpsample | None:
        covered = isinstance(block.conv, IntegerLayer) and block.interpolate and block.norm is None
        return IntegerUpsample(block) if covered else None

    def forward(self, x: Tensor, output_size: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        if output_size is None:
            y: Tensor = self.conv.run(x, up=2)
            return y
        resized: Tensor = self.conv.run(nn.functional.interpolate(x, size=output_size, mode="nearest"))
        return resized


class IntegerAttention(nn.Module):
    """Self-attention over the pixels of an image, with the residual of ``Attention``."""

    def __init__(self, block: Any, record: LayerRecord, step: Step, attend: Attend) -> None:
        super().__init__()
        self.record, self.step = record, step
        timed = all(quantizer.name in step for quantizer in record.inputs)
        self.attend = attend if timed else reference_attend
        self.bits = [quantizer.bits for quantizer in record.inputs]
        self.to_q, self.to_k, self.to_v, self.to_out = block.to_q, block.to_k, block.to_v, block.to_out[0]
        self.heads, self.scale = int(block.heads), float(block.scale)
        self.residual, self.factor = bool(block.residual_connection), float(block.rescale_output_factor)
        for layer in (self.to_q, self.to_k, self.to_v):
            layer.norm = None if block.group_norm is None else norm_of(block.group_norm, silu=False)

    @staticmethod
    def of(block: Any, record: LayerRecord, step: Step, attend: Attend) -> IntegerAttention | None:
        covered = (
            all(_takes_norm(layer) for layer in (block.to_q, block.to_k, block.to_v))
            and isinstance(block.to_out[0], IntegerLayer)
            and (block.group_norm is None or norm_of(block.group_norm, silu=False) is not None)
            and (block.spatial_norm is None and block.norm_q is None and block.norm_k is None)
            and not block.is_cross_attention
        )
        return IntegerAttention(block, record, step, attend) if covered else None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        height, width = x.shape[2:]
        q, k, v = (layer.run(x).permute(0, 2, 3, 1) for layer in (self.to_q, self.to_k, self.to_v))
        q, k, v = (y.flatten(1, 2).unflatten(2, (self.heads, -1)) for y in (q, k, v))
        out = self.attend(q, k, v, self._interval, self.bits, self.scale)
        out = out.flatten(2).unflatten(1, (height, width)).permute(0, 3, 1, 2)
        y: Tensor = self.to_out.run(out, onto=x.clone() if self.residual else None)
        return y if self.factor == 1 else y / self.factor

    def _interval(self, index: int, x: Tensor) -> Interval:
        return self.step.interval(self.record.inputs[index].name, x)


FUSED: dict[type[nn.Module], Callable[[Any], nn.Module | None]] = {
    ResnetBlock2D: IntegerResnet.of,
    Upsample2D: IntegerUpsample.of,
}


def fuse(model: nn.Module) -> list[str]:
    """Put fused blocks in the place of what they cover; returns their names."""
    done = []
    for name, module in list(model.named_modules()):
        make = next((make for cls, make in FUSED.items() if isinstance(module, cls)), None)
        fused = make(module) if make else None
        if fused is not None:
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, fused)
            done.append(name)
    return done + _fuse_output(model) + _fuse_time(model)


def _fuse_time(model: nn.Module) -> list[str]:
    """The weight-only time-embedding linears of the residual blocks."""
    resnets = (m for m in model.modules() if isinstance(m, IntegerResnet))
    blocks = [block for block in resnets if isinstance(block.time_emb_proj, WeightOnlyLayer)]
    if not blocks:
        return []
    together = TimeProjections([block.time_emb_proj for block in blocks])
    model.add_module("time_projections", together)
    for index, block in enumerate(blocks):
        block.time_emb_proj = None
        block.shift = partial(together, index=index)
    return ["time_projections"]


def _fuse_output(model: Any) -> list[str]:
    """The last norm, SiLU and convolution of a UNet2DModel."""
    own = dict(model.named_children())
    if not isinstance(own.get("conv_act"), nn.SiLU) or not _takes_norm(own.get("conv_out")):
        return []
    model.conv_out.norm = norm_of(model.conv_norm_out, silu=True)
    if model.conv_out.norm is None:
        return []
    model.conv_norm_out = model.conv_act = nn.Identity()
    return ["conv_out"]
