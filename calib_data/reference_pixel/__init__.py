"""The third embedded model: an unconditional DDIM U-Net on pixels, the seed paper's own setting."""

from __future__ import annotations

from pathlib import Path


def reference_pixel_path() -> Path:
    """Return the folder with ``unet/`` and ``scheduler/``, as diffusers writes them, and their card."""
    return Path(__file__).parent
