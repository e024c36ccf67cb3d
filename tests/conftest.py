"""One thread: the suite's results and its time do not depend on the number of cores."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from diffusers import UNet2DModel
from unets import tiny_unet as make_tiny_unet

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
    return make_tiny_unet
