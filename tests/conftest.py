"""One thread: the suite's results and its time do not depend on the number of cores."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel

torch.set_num_threads(1)
# Commands run inside this process or are forked from it, and a fork would wait for threads that OpenMP has once had.
torch.set_num_threads = lambda count: None


@pytest.fixture(autouse=True)
def processor_state() -> Iterator[None]:
    """Undo what a command run inside the test process sets for the process as a whole."""
    yield
    torch.set_flush_denormal(False)


@pytest.fixture(scope="session")
def tiny_unet() -> Callable[..., UNet2DModel]:
    """Build a U-Net of 8 and 16 channels with random weights, attention and skips of different widths."""

    def make(**changes: Any) -> UNet2DModel:
        torch.manual_seed(0)
        options = {
            "sample_size": 8,
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            "norm_num_groups": 4,
        }
        return UNet2DModel(**(options | changes)).eval().requires_grad_(False)

    return make
