"""The second classifier: measures, and is used for no training (the first one's feature maps trained the decoder)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from ptq_tdq.calib_data.reference import ConvMixer
from reference_model.data import draw_images
from reference_model.loop import fast_autocast

SMOOTHING, SHIFT, HOLE = 0.1, 4, 8


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Images [B, 3, H, W], each moved by up to 4 pixels and with a grey square of 8 pixels somewhere."""
    batch, _, height, width = images.shape
    device = images.device

    def draw(high: int) -> torch.Tensor:
        return torch.randint(high, (batch, 1), generator=generator, device=device)

    padded = functional.pad(images, (SHIFT,) * 4, mode="reflect")
    rows = draw(2 * SHIFT + 1) + torch.arange(height, device=device)
    columns = draw(2 * SHIFT + 1) + torch.arange(width, device=device)
    picture = torch.arange(batch, device=device)[:, None, None]
    moved = padded.permute(0, 2, 3, 1)[picture, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)

    def covered(size: int) -> torch.Tensor:
        distance = torch.arange(size, device=device) - draw(size)
        return (distance >= -HOLE // 2) & (distance < HOLE // 2)

    hole = covered(height)[:, :, None] & covered(width)[:, None, :]
    return moved.masked_fill(hole[:, None], 0.0)


def classifier_loss(
    images: torch.Tensor, labels: torch.Tensor, batch: int
) -> Callable[[ConvMixer, torch.Generator], torch.Tensor]:
    """Cross-entropy with smoothed labels on a batch of augmented images [2, N, 3, 32, 32] in [-1, 1]."""

    def loss(model: ConvMixer, generator: torch.Generator) -> torch.Tensor:
        x, classes = draw_images(images, labels, batch, generator)
        x = augment(x, generator).contiguous(memory_format=torch.channels_last)
        with fast_autocast(x.device):
            logits = model(x)
        return functional.cross_entropy(logits.float(), classes, label_smoothing=SMOOTHING)

    return loss
