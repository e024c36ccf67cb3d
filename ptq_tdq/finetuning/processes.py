"""Several processes that learn together, as ``torchrun`` or ``accelerate launch`` start them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import Tensor, distributed, nn

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


def begin_alike(tensors: Iterable[Tensor]) -> None:
    """Give all processes the first one's values."""
    for tensor in tensors if count() > 1 else ():
        distributed.broadcast(tensor, 0)


def mean_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Make each gradient the mean of all processes' ones; it is None where it is None in all of them."""
    if count() == 1:
        return
    known = torch.tensor([float(p.grad is not None) for p in parameters], device=parameters[0].device)
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = mean(torch.cat([known, *(gradient.flatten() for gradient in gradients)]))
    known, *means = flat.split([len(parameters), *(p.numel() for p in parameters)])
    for parameter, found, gradient in zip(parameters, known.tolist(), means, strict=True):
        parameter.grad = gradient.view_as(parameter) if found else None


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
