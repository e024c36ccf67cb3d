"""Training images, and the latents that the U-Net and the decoder are trained on."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}


def load_images(source: Path, split: str = "train", size: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """Images uint8 [N, 3, size, size] and labels int64 [N].

    ``source`` is an ``.npz`` with ``<split>_jpeg`` (uint8, all files end to end), ``<split>_offsets`` (int64 [N + 1])
    and ``<split>_labels``, or a folder with one sub-folder of images per class (labels follow the alphabetical order).
    """
    if source.is_dir():
        folders = sorted(path for path in source.iterdir() if path.is_dir())
        files = [(path, label) for label, folder in enumerate(folders) for path in sorted(folder.rglob("*"))]
        files = [(path, label) for path, label in files if path.suffix.lower() in SUFFIXES]
        return _stack((path.read_bytes() for path, _ in files), size), torch.tensor([label for _, label in files])
    with np.load(source) as archive:
        data, offsets = archive[f"{split}_jpeg"].tobytes(), archive[f"{split}_offsets"].tolist()
        labels = torch.from_numpy(archive[f"{split}_labels"].astype(np.int64))
    return _stack((data[a:b] for a, b in pairwise(offsets)), size), labels


def _stack(encoded: Iterable[bytes], size: int) -> torch.Tensor:
    images = []
    for blob in encoded:
        image = Image.open(io.BytesIO(blob)).convert("RGB")
        if image.size != (size, size):
            image = image.resize((size, size), Image.Resampling.BOX)
        images.append(np.asarray(image))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def draw_images(
    images: torch.Tensor, labels: torch.Tensor, batch: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """A random batch float32 [B, ...] of ``images`` [2, N, ...], half of it mirror images, and its classes [B]."""
    index = torch.randint(images.shape[1], (batch,), generator=generator, device=images.device)
    flip = torch.randint(2, (batch,), generator=generator, device=images.device)
    return images[flip, index].float(), labels[index]


def to_unit(images: torch.Tensor) -> torch.Tensor:
    """uint8 [0, 255] -> float32 [-1, 1]."""
    return images.float() / 127.5 - 1


@torch.no_grad()
def encode(vae: AutoencoderKL, images: torch.Tensor, batch: int = 250) -> torch.Tensor:
    """Mode of the encoder x scaling_factor for uint8 images [N, 3, H, W]: float32 [N, 4, H / 2, W / 2]."""
    return torch.cat(
        [
            vae.encode(to_unit(part.to(vae.device))).latent_dist.mode().cpu() * vae.config.scaling_factor
            for part in images.split(batch)
        ]
    )


def cached_latents(vae: AutoencoderKL, images: torch.Tensor, cache: Path) -> torch.Tensor:
    """Latents float16 [2, N, 4, h, w] of the images and of their mirror images, computed once."""
    if not cache.exists():
        both = torch.stack([encode(vae, images).half(), encode(vae, images.flip(3)).half()])
        save_atomic(both, cache)
    latents: torch.Tensor = torch.load(cache, weights_only=True)
    return latents


def save_atomic(value: object, path: Path) -> None:
    """``torch.save`` that never leaves half a file under the final name."""
    partial = path.with_suffix(path.suffix + ".partial")
    with partial.open("wb") as file:
        torch.save(value, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
