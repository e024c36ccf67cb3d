"""Pictures of samples side by side."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ptq_tdq.evaluate.images import CAPTION_HEIGHT, captions_of, columns_for, count_classes, grid


def test_panels_stand_side_by_side_with_every_pixel_enlarged() -> None:
    red, grey = torch.tensor([1.0, -1.0, -1.0]).view(1, 3, 1, 1).expand(3, 3, 4, 4), torch.zeros(3, 1, 4, 4)
    picture = np.asarray(grid({"a": red, "b": grey}, columns=2, scale=2))
    panel = picture[-16:]  # 2 rows of 4 pixels, twice enlarged, below the title
    assert picture.shape[1] == 16 + 8 + 16
    assert (panel[:8, :16] == [255, 0, 0]).all() and (panel[8:, :8] == [255, 0, 0]).all()
    assert (panel[8:, 8:16] == 255).all(), "the last place of three in two columns stays empty"
    assert (panel[:8, 24:] == 128).all()


def test_captions_stand_above_their_pictures_and_never_on_the_next_one() -> None:
    black = -torch.ones(4, 3, 32, 32)
    picture = np.asarray(
        grid({"a": black}, columns=2, scale=1, captions=["class 3", "a prompt of many words", "", "x"])
    )
    assert picture.shape[:2] == (CAPTION_HEIGHT + 2 * (CAPTION_HEIGHT + 32), 64)
    rows = picture[CAPTION_HEIGHT:].reshape(2, CAPTION_HEIGHT + 32, 64, 3)
    assert (rows[:, CAPTION_HEIGHT:] == 0).all(), "no caption on a picture"
    inked = (rows[:, :CAPTION_HEIGHT] < 255).any((1, 3)).reshape(2, 2, 32)
    assert inked.any(2).tolist() == [[True, True], [False, True]]
    assert not inked[:, :, -1].any(), "a text that is too long is cut"


@pytest.mark.parametrize(("side", "width"), [(8, 24), (32, 96), (64, 64), (256, 256)])
def test_small_pictures_are_enlarged_and_large_ones_are_not(side: int, width: int) -> None:
    assert grid({"a": torch.zeros(1, 3, side, side)}, columns=1).width == width


def test_pictures_are_named_after_what_they_were_asked_to_show() -> None:
    assert captions_of(["a fox", "a boat"]) == ["a fox", "a boat"] and count_classes(["a fox", "a boat"]) == 0
    assert captions_of([0, 7]) == ["class 0", "class 7"] and count_classes([0, 7, 0]) == 2
    assert captions_of([None, None]) == [] and count_classes([None]) == 0


@pytest.mark.parametrize(
    ("count", "classes", "expected"), [(20, 10, 10), (9, 0, 3), (4, 10, 2), (20, 1000, 4), (1, 0, 1)]
)
def test_columns_of_a_grid(count: int, classes: int, expected: int) -> None:
    assert columns_for(count, classes) == expected


def test_panels_that_do_not_fit_beside_each_other_stand_below() -> None:
    white, black = torch.ones(1, 3, 90, 900), -torch.ones(1, 3, 90, 900)
    picture = np.asarray(grid({"a": white, "b": white, "c": black}, columns=1, scale=1))
    assert picture.shape == (2 * (90 + CAPTION_HEIGHT) + 4, 2 * 900 + 4, 3)
    assert (picture[-90:, :900] == 0).all() and (picture[-90:, 900:] == 255).all()
