"""Calls of a model that compute no gradients, and the models that do not let them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ptq_tdq.errors import ModelError
from ptq_tdq.hooks import hooked
from ptq_tdq.modules.layers import layer_kind


@contextmanager
def without_gradients(model: nn.Module) -> Iterator[None]:
    """Calls of ``model`` compute no gradients.

    Raises :class:`ModelError` for a model that differentiates itself, or turns on inference mode in its forward.
    """
    inference = torch.is_inference_mode_enabled()
    refusal = ModelError(
        f"{type(model).__name__} differentiates itself in its forward, and quantized layers have no such gradients; "
        "quantize a model that computes its prediction directly."
    )

    def refuse(*_: Any) -> None:
        if torch.is_grad_enabled():
            raise refusal
        if torch.is_inference_mode_enabled() and not inference:
            raise ModelError(
                f"{type(model).__name__} turns inference mode on in its forward, and nothing learns from its tensors; "
                "take torch.inference_mode out of the model and put it around the calls."
            )

    layers = [module for module in model.modules() if layer_kind(module)]
    try:
        with torch.no_grad(), hooked(layer.register_forward_pre_hook(refuse) for layer in layers):
            yield
    except RuntimeError as error:
        if "does not require grad" in str(error):
            raise refusal from error
        raise
