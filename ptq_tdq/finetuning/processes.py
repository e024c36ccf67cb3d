"""Several processes that learn together, as ``torchrun`` or ``accelerate launch`` start them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from torch import Tensor, distributed

PATIENCE = timedelta(hours=12)  # the first process may collect calls while others wait


def join(device: str) -> str:
    """Join the other processes of a launch, if there are any; returns the device of this one."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or distributed.is_initialized():
        return device
    on_gpu = device.partition(":")[0] == "cuda"
    distributed.init_process_group("nccl" if on_gpu else "gloo", timeout=PATIENCE)
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if on_gpu else device


def leave() -> None:
    """End what :func:`join` began."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def rank() -> int:
    """The number of this process, from 0."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def count() -> int:
    """How many processes there are."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def mean(value: Tensor) -> Tensor:
    """The mean of all processes' values, in each."""
    if count() > 1:
        distributed.all_reduce(value)
        value = value / count()
    return value


@contextmanager
def first_alone() -> Iterator[None]:
    """The first process runs the body before all others: it makes the files that they then read."""
    if count() > 1 and rank() > 0:
        distributed.barrier()
    try:
        yield
    finally:
        if count() > 1 and rank() == 0:
            distributed.barrier()
