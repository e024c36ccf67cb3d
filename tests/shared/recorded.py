"""Recorded calls of a small model, made in one line."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ptq_tdq import Calls, record


def calls_of(model: nn.Module, *args: Any, num_train_timesteps: int | None = None, **kwargs: Any) -> Calls:
    """What :func:`ptq_tdq.record` keeps of one call of ``model``."""
    with record(model, num_train_timesteps=num_train_timesteps) as calls, torch.no_grad():
        model(*args, **kwargs)
    return calls


def images(rows: int, channels: int = 3, size: int = 8, seed: int = 0) -> Tensor:
    """Standard normal x [rows, channels, size, size]."""
    return torch.randn(rows, channels, size, size, generator=torch.Generator().manual_seed(seed))
