"""Latents to pictures."""

from __future__ import annotations

import io

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ptq_tdq.calib_data import LoadedModel

CAPTION_HEIGHT = 14


@torch.no_grad()
def decode(model: LoadedModel, latents: Tensor) -> Tensor:
    """Images [N, 3, H, W] in [-1, 1] of latents [N, C, h, w]: through the model's VAE, or unchanged without one."""
    if model.vae is None:
        return latents.clamp(-1, 1)
    shift = getattr(model.vae.config, "shift_factor", None) or 0.0
    images: Tensor = model.vae.decode(latents / model.vae.config.scaling_factor + shift, return_dict=False)[0]
    return images.clamp(-1, 1)


def columns_for(count: int, num_classes: int) -> int:
    """Columns of a grid of ``count`` pictures: one per class where that fits, else about a square."""
    return num_classes if 1 < num_classes <= min(count, 10) else max(1, round(count**0.5))


def grid_png(panels: dict[str, Tensor], num_classes: int, most: int | None = None) -> bytes:
    """The file of a :func:`grid` of the first ``most`` images of each panel, or of all."""
    shown = {caption: images[:most] for caption, images in panels.items()}
    buffer = io.BytesIO()
    grid(shown, columns_for(max(map(len, shown.values())), num_classes)).save(buffer, format="PNG")
    return buffer.getvalue()


def grid(panels: dict[str, Tensor], columns: int, scale: int = 3) -> Image.Image:
    """Captioned panels of images [N, 3 or 1, H, W] in [-1, 1], side by side and enlarged ``scale`` times."""
    drawn = {caption: _panel(images, columns, scale) for caption, images in panels.items()}
    gap = 4 * scale
    width = sum(p.width for p in drawn.values()) + gap * (len(drawn) - 1)
    height = max(p.height for p in drawn.values()) + CAPTION_HEIGHT
    canvas, left = Image.new("RGB", (width, height), "white"), 0
    pen = ImageDraw.Draw(canvas)
    for caption, panel in drawn.items():
        pen.text((left + 1, 1), caption, fill="black")
        canvas.paste(panel, (left, CAPTION_HEIGHT))
        left += panel.width + gap
    return canvas


def _panel(images: Tensor, columns: int, scale: int) -> Image.Image:
    pixels = ((images.float().cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    pixels = pixels.expand(-1, -1, -1, 3)
    count, height, width, _ = pixels.shape
    rows = -(-count // columns)
    panel = Image.new("RGB", (columns * width, rows * height), "white")
    for i, picture in enumerate(pixels.numpy()):
        panel.paste(Image.fromarray(picture), (i % columns * width, i // columns * height))
    return panel.resize((panel.width * scale, panel.height * scale), Image.Resampling.NEAREST)
