"""Latents to pixels."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel

from ptq_tdq.calib_data import LoadedModel, load_model
from ptq_tdq.evaluate.images import columns_for, decode, grid


def test_without_a_vae_latents_are_images(tiny_unet: Callable[..., UNet2DModel]) -> None:
    model = LoadedModel(tiny_unet(), DDIMScheduler(), None, "tiny", "0" * 64)
    assert decode(model, torch.tensor([-3.0, -0.5, 0.5, 3.0])).tolist() == [-1.0, -0.5, 0.5, 1.0]


def test_latents_are_scaled_back_for_the_vae() -> None:
    """The sampler's latents are (z - shift) * scaling_factor, as diffusers' training and pipelines have them."""
    model = load_model()
    assert model.vae is not None
    z = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    shift = getattr(model.vae.config, "shift_factor", None) or 0.0
    with torch.no_grad():
        expected = model.vae.decode(z).sample.clamp(-1, 1)
    torch.testing.assert_close(decode(model, (z - shift) * model.vae.config.scaling_factor), expected)


def test_panels_stand_side_by_side_with_every_pixel_enlarged() -> None:
    red, grey = torch.tensor([1.0, -1.0, -1.0]).view(1, 3, 1, 1).expand(3, 3, 4, 4), torch.zeros(3, 1, 4, 4)
    picture = np.asarray(grid({"a": red, "b": grey}, columns=2, scale=2))
    panel = picture[-16:]  # 2 rows of 4 pixels, twice enlarged, below the caption
    assert picture.shape[1] == 16 + 8 + 16
    assert (panel[:8, :16] == [255, 0, 0]).all() and (panel[8:, :8] == [255, 0, 0]).all()
    assert (panel[8:, 8:16] == 255).all(), "the last place of three in two columns stays empty"
    assert (panel[:8, 24:] == 128).all()


@pytest.mark.parametrize(
    ("count", "classes", "expected"), [(20, 10, 10), (9, 0, 3), (4, 10, 2), (20, 1000, 4), (1, 0, 1)]
)
def test_columns_of_a_grid(count: int, classes: int, expected: int) -> None:
    assert columns_for(count, classes) == expected
