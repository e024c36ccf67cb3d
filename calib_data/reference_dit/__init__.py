"""The second embedded model: a class-conditional transformer (flow matching) on the latents of the embedded VAE."""

from __future__ import annotations

from pathlib import Path


def reference_dit_path() -> Path:
    """Return the folder with ``transformer/`` and ``scheduler/``, as diffusers writes them, and their card."""
    return Path(__file__).parent
