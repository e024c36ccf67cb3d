"""The classifier of 32x32 images whose features FD-C10 is measured in."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn
from torch.nn.functional import gelu

FEATURES = 256


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1)


class Residual(nn.Module):
    """x + gelu(b(gelu(a(x)))), [N, C, H, W] -> the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.a = _conv(channels, channels)
        self.b = _conv(channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + gelu(self.b(gelu(self.a(x))))


class Cifar10Classifier(nn.Module):
    """A convolutional network without normalization layers (batch norms are folded into the convolutions)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv(3, 32)
        self.down1 = _conv(32, 64, stride=2)
        self.res1 = Residual(64)
        self.down2 = _conv(64, 128, stride=2)
        self.res2 = Residual(128)
        self.down3 = _conv(128, FEATURES, stride=2)
        self.res3 = Residual(FEATURES)
        self.head = nn.Linear(FEATURES, 10)

    def feature_maps(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Images [N, 3, 32, 32] in [-1, 1] -> maps [N, 64, 16, 16], [N, 128, 8, 8] and [N, 256, 4, 4]."""
        x = gelu(self.stem(images))
        first = self.res1(gelu(self.down1(x)))
        second = self.res2(gelu(self.down2(first)))
        return first, second, self.res3(gelu(self.down3(second)))

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Images [N, 3, 32, 32] in [-1, 1] -> features [N, 256]: the last maps' mean over space."""
        return self.feature_maps(images)[2].mean((2, 3))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images [N, 3, 32, 32] in [-1, 1] -> logits [N, 10] of the classes in alphabetical order."""
        return cast(torch.Tensor, self.head(self.features(images)))
