"""Pictures of samples side by side."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

CAPTION_HEIGHT = 14
WIDEST = 2000  # pixels of a row of panels, unless one alone is wider
LARGEST = 96  # pixels of a small image's enlarged side, and at most 3 times its own


def columns_for(count: int, num_classes: int) -> int:
    """Columns of a grid of ``count`` pictures: one per class where that fits, else about a square."""
    return num_classes if 1 < num_classes <= min(count, 10) else max(1, round(count**0.5))


def captions_of(conditions: Sequence[Any]) -> list[str]:
    """What a picture of each sample is called: its prompt or its class; nothing for samples of no condition."""
    if not conditions or conditions[0] is None:
        return []
    return [condition if isinstance(condition, str) else f"class {condition}" for condition in conditions]


def count_classes(conditions: Sequence[Any]) -> int:
    """The number of classes among the conditions of samples; 0 for prompts and for samples of no condition."""
    return len({condition for condition in conditions if isinstance(condition, int)})


def grid_png(panels: dict[str, Tensor], conditions: Sequence[Any], most: int | None = None) -> bytes:
    """The file of a :func:`grid` of the first ``most`` images of each panel, or of all, which show ``conditions``."""
    shown = {title: images[:most] for title, images in panels.items()}
    buffer = io.BytesIO()
    columns = columns_for(max(map(len, shown.values())), count_classes(conditions))
    grid(shown, columns, captions=captions_of(conditions)).save(buffer, format="PNG")
    return buffer.getvalue()


def grid(
    panels: dict[str, Tensor], columns: int, scale: int | None = None, captions: Sequence[str] = ()
) -> Image.Image:
    """Titled panels of images [N, 3 or 1, H, W] in [-1, 1], enlarged ``scale`` times, side by side as far as they fit.

    ``captions`` stand above the images of each panel, as far as they fit. Small images are enlarged by default.
    """
    first = next(iter(panels.values()))
    scale = scale or max(1, min(3, LARGEST // max(first.shape[2:])))
    drawn = {title: _panel(images, columns, scale, captions) for title, images in panels.items()}
    gap, wide = 4 * scale, max(p.width for p in drawn.values())
    high = max(p.height for p in drawn.values()) + CAPTION_HEIGHT
    abreast = min(len(drawn), max(1, (WIDEST + gap) // (wide + gap)))
    below = -(-len(drawn) // abreast)
    canvas = Image.new("RGB", ((wide + gap) * abreast - gap, (high + gap) * below - gap), "white")
    pen = ImageDraw.Draw(canvas)
    for i, (title, panel) in enumerate(drawn.items()):
        left, top = i % abreast * (wide + gap), i // abreast * (high + gap)
        pen.text((left + 1, top + 1), title, fill="black")
        canvas.paste(panel, (left, top + CAPTION_HEIGHT))
    return canvas


def _panel(images: Tensor, columns: int, scale: int, captions: Sequence[str]) -> Image.Image:
    pixels = ((images.float().cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    pixels = pixels.expand(-1, -1, -1, 3)
    count, height, width = len(pixels), pixels.shape[1] * scale, pixels.shape[2] * scale
    above = CAPTION_HEIGHT if captions else 0
    panel = Image.new("RGB", (columns * width, -(-count // columns) * (height + above)), "white")
    pen = ImageDraw.Draw(panel)
    for i, picture in enumerate(pixels.numpy()):
        left, top = i % columns * width, i // columns * (height + above)
        enlarged = Image.fromarray(picture).resize((width, height), Image.Resampling.NEAREST)
        panel.paste(enlarged, (left, top + above))
        if i < len(captions):
            pen.text((left + 1, top + 1), _fitting(captions[i], width - 2), fill="black")
    return panel


def _fitting(text: str, width: int) -> str:
    """As much of a text as ``width`` pixels hold."""
    font = ImageFont.load_default()
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text.rstrip() + "..." if text else ""
