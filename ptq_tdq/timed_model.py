"""A module around a diffusion model: the original's call signature, and a hook that hears of each call's time steps."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from ptq_tdq.errors import ModelError


def require_timestep(model: nn.Module) -> None:
    """Raise :class:`ModelError` unless the model's forward takes ``timestep``."""
    if "timestep" not in inspect.signature(model.forward).parameters:
        raise ModelError(
            f"{type(model).__name__}.forward has no argument named 'timestep'; intervals depend on it. "
            "Give a diffusion model such as UNet2DModel."
        )


def in_float32(value: Any) -> Any:
    """``value``, or what a dict, list or tuple holds, with the floating tensors in float32."""
    if type(value) is dict:
        return {key: in_float32(inner) for key, inner in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(in_float32, value))
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


class TimedModel(nn.Module, ABC):
    """Calls ``model`` as it is called itself (``pipe.unet = ...``) after :meth:`at` has heard of ``timestep``.

    ``config``, ``dtype`` and ``device`` are those of the wrapped model.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        require_timestep(model)
        self.model = model
        self._signature = inspect.signature(model.forward)

    @abstractmethod
    def at(self, t: Tensor | float | int) -> None:
        """Make ready for a forward pass at time steps ``t``, a scalar or one per sample [B]."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped model's forward; raises :class:`~ptq_tdq.errors.TimestepError` for t outside the tables.

        A float32 model takes inputs of any floating dtype, as they come where torch's default dtype is another.
        """
        self.at(self._signature.bind(*args, **kwargs).arguments["timestep"])
        if self.dtype == torch.float32:
            args, kwargs = in_float32(args), in_float32(kwargs)
        return self.model(*args, **kwargs)

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device
