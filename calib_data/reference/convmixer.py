"""A second classifier of 32x32 images, of another architecture, that took no part in any training."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

WIDTH, DEPTH, KERNEL, PATCH = 256, 8, 5, 2


class Residual(nn.Module):
    """x + inner(x)."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, x + self.inner(x))


def _after(convolution: nn.Conv2d) -> nn.Sequential:
    return nn.Sequential(convolution, nn.GELU(), nn.BatchNorm2d(convolution.out_channels))


class ConvMixer(nn.Module):
    """Patches, then depthwise and pointwise convolutions in turn (Trockman and Kolter, arXiv 2201.09792)."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = _after(nn.Conv2d(3, WIDTH, PATCH, stride=PATCH))
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(
                    Residual(_after(nn.Conv2d(WIDTH, WIDTH, KERNEL, padding="same", groups=WIDTH))),
                    _after(nn.Conv2d(WIDTH, WIDTH, 1)),
                )
                for _ in range(DEPTH)
            )
        )
        self.head = nn.Linear(WIDTH, 10)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Images [N, 3, 32, 32] in [-1, 1] -> features [N, 256]: the last maps' mean over space."""
        return cast(torch.Tensor, self.blocks(self.patches(images)).mean((2, 3)))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images [N, 3, 32, 32] in [-1, 1] -> logits [N, 10] of the classes in alphabetical order."""
        return cast(torch.Tensor, self.head(self.features(images)))
