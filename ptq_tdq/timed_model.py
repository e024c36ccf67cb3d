"""A module around a denoiser: the original's call signature, with each call's time steps at hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ptq_tdq.calls import bind
from ptq_tdq.timeaxis import TimeAxis, at


def in_float32(value: Any) -> Any:
    """``value``, or what a dict, list or tuple holds, with the floating tensors in float32."""
    if type(value) is dict:
        return {key: in_float32(inner) for key, inner in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(in_float32, value))
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


class TimedModel(nn.Module):
    """Calls ``model`` as it is called itself (``pipe.unet = ...``), at the time steps of its own time argument.

    Whatever a pipeline asks of the denoiser beside calling it (``config``, ``dtype``, ``device``, ``cache_context``,
    ...) is asked of the wrapped model.
    """

    def __init__(self, model: nn.Module, axis: TimeAxis) -> None:
        super().__init__()
        self.model, self.axis = model, axis

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped model's forward; raises :class:`~ptq_tdq.errors.TimestepError` for t outside the tables.

        A float32 model takes inputs of any floating dtype, as they come where torch's default dtype is another.
        """
        t = self.axis.t(bind(self.model, args, kwargs).get(self.axis.argument))
        if self.dtype == torch.float32:
            args, kwargs = in_float32(args), in_float32(kwargs)
        with at(t):
            return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":  # not there yet
                raise
            return getattr(super().__getattr__("model"), name)

    @property
    def dtype(self) -> torch.dtype:
        return next(p.dtype for p in self.model.parameters() if p.is_floating_point())

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device
