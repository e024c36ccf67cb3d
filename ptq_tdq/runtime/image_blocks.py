"""Blocks of images as one call of ``native.c``: residual blocks, and attention over pixels.

The memory of images is that of rows of pixels, [B, H, W, C], which is what torch calls channels_last.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ptq_tdq.runtime.attention import IntegerProduct
from ptq_tdq.runtime.kernels import SILU, Norm
from ptq_tdq.runtime.layer import IntegerLayer, IntegerLinear
from ptq_tdq.runtime.passes import Place, Plan, Plans, in_passes


class Planned:
    """The passes of a block from images [B, C, H, W] to images of as many pixels; ``first`` and ``last`` are layers."""

    def __init__(self, first: IntegerLayer, last: IntegerLayer) -> None:
        self.step, self.native = first.step, first.parts[0].native
        self.channels, self.outputs = first.parts[-1].channels[1], len(last.scale)
        self.plans = Plans()

    def takes(self, x: Tensor) -> bool:
        """Whether x has the form that plans are made for."""
        return x.ndim == 4 and x.shape[1] == self.channels and x.numel() > 0 and not x.is_complex()

    def passes(self, plan: Plan, x: Place, given: Sequence[Place | None], out: Place) -> None:
        """From x [B, H, W, C], and what else is given, to ``out`` [B, H, W, O]."""
        raise NotImplementedError

    def compute(self, x: Tensor, *given: Tensor | None) -> Tensor:
        """x [B, H, W, C], and what else there is, all without gaps -> [B, O, H, W]; nothing of it is written to."""
        each = not self.step.alike(x.shape[0])
        key = x.shape, each, *(None if tensor is None else tensor.shape for tensor in given)
        plan = self.plans.find(key, lambda: self._plan(x, given, each=each))
        out = torch.empty(*x.shape[:-1], self.outputs, dtype=torch.float32)
        plan(x, out, *(tensor for tensor in given if tensor is not None))
        return out.permute(0, 3, 1, 2)

    def _plan(self, x: Tensor, given: Sequence[Tensor | None], *, each: bool) -> Plan:
        """The passes for tensors of these shapes; samples have an interval ``each``, or there is one for all."""
        assert self.native is not None
        plan = Plan(self.native.library, self.step, len(x), each=each)
        start, out = plan.given("an image", x.shape), plan.given("a block's result", (*x.shape[:-1], self.outputs))
        rest = [None if tensor is None else plan.given("what a block is given", tensor.shape) for tensor in given]
        self.passes(plan, start, rest, out)
        return plan


class PlannedResnet(Planned):
    """Those of a residual block: both convolutions behind their norms, and its shortcut, where that can be a pass."""

    def __init__(self, block: Any, norms: Sequence[Norm | None]) -> None:
        super().__init__(block.conv1, block.conv2)
        self.block, self.norms = block, norms
        self.has_shortcut = in_passes(block.conv_shortcut, IntegerLayer)
        self.is_apart = block.conv_shortcut is not None and not self.has_shortcut

    @staticmethod
    def of(block: Any, norms: Sequence[Norm | None]) -> PlannedResnet | None:
        """None where a convolution cannot be a pass."""
        planned = all(in_passes(conv, IntegerLayer, normed=True) for conv in (block.conv1, block.conv2))
        return PlannedResnet(block, norms) if planned else None

    def __call__(self, x: Tensor, shift: Tensor | None) -> Tensor:
        """x [B, C, H, W] and the shift [B, O] before the second norm -> [B, O, H, W]."""
        residual = self.block.conv_shortcut(x) if self.is_apart else None
        with torch._C.DisableTorchFunction():  # what follows is not to be listened to
            shift = None if shift is None else shift.float().contiguous()
            return self.compute(rows(x), shift, None if residual is None else rows(residual))

    def passes(self, plan: Plan, x: Place, given: Sequence[Place | None], out: Place) -> None:
        block, (first, second), (shift, residual) = self.block, self.norms, given
        if self.has_shortcut:
            residual = plan.convolve(block.conv_shortcut, x, to=out)
        y = plan.convolve(block.conv1, x, SILU, norm=first)
        plan.convolve(block.conv2, y, SILU, norm=second, shift=shift, onto=residual or x, to=out)


class PlannedAttention(Planned):
    """Those of attention over pixels: its linears, three of them behind the norm, and its product."""

    def __init__(self, block: Any, norm: Norm | None, product: IntegerProduct) -> None:
        super().__init__(block.to_q, block.to_out[0])
        self.block, self.norm, self.product = block, norm, product

    @staticmethod
    def of(block: Any, norm: Norm | None, product: IntegerProduct) -> PlannedAttention | None:
        """None where something cannot be a pass."""
        operands = block.to_q, block.to_k, block.to_v
        planned = (
            product.step.columns(product.record.inputs) is not None
            and all(in_passes(layer, IntegerLinear, normed=True) for layer in operands)
            and in_passes(block.to_out[0], IntegerLinear)
            and len({layer.out_features for layer in operands}) == 1
        )
        return PlannedAttention(block, norm, product) if planned else None

    def __call__(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> the same."""
        return self.compute(rows(x))

    def passes(self, plan: Plan, x: Place, given: Sequence[Place | None], out: Place) -> None:
        samples, *size, _ = x.shape
        q, k, v = (
            tokens(plan.convolve(layer, x, norm=self.norm))
            for layer in (self.block.to_q, self.block.to_k, self.block.to_v)
        )
        y = plan.attend(self.product, (q, k, v), self.block.heads, None)
        image = y._replace(shape=(samples, *size, y.shape[-1]))
        plan.convolve(self.block.to_out[0], image, onto=x if self.block.residual_connection else None, to=out)


def rows(x: Tensor) -> Tensor:
    """An image [B, C, H, W] as [B, H, W, C] without gaps."""
    return x.float().contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)


def tokens(image: Place) -> Place:
    """[B, H, W, C] -> [B, N, C]."""
    samples, height, width, channels = image.shape
    return image._replace(shape=(samples, height * width, channels))
