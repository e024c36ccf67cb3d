"""Puts quantizers into a model by its plan, and switches them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import nn

from ptq_tdq.errors import ModelError, NonFiniteError
from ptq_tdq.modules import ActivationQuantizer, QuantAttnProcessor, QuantLayer
from ptq_tdq.records import LayerRecord
from ptq_tdq.timeaxis import Clock


def insert(model: nn.Module, record: LayerRecord, clock: Clock) -> None:
    """Put the quantizers of one record into ``model``, switched off.

    Raises :class:`ModelError` where the model has no such layer, :class:`NonFiniteError` for NaN or Inf in its weights.
    """
    try:
        module = model.get_submodule(record.name)
    except AttributeError:
        raise ModelError(f"The model has no layer named {record.name!r}; it is not the model of this plan.") from None
    if isinstance(module, Attention):
        processor: Any = QuantAttnProcessor(module.processor, record, clock)  # diffusers' annotation names one class
        module.set_processor(processor)
        return
    for key, value in module.named_parameters():
        if not bool(torch.isfinite(value).all()):
            raise NonFiniteError(f"{record.name} has NaN or Inf in its {key}; repair the model before quantizing it.")
    parent, _, own = record.name.rpartition(".")
    setattr(model.get_submodule(parent), own, QuantLayer(module, record, clock))


def switch(module: nn.Module, *, weights: bool, activations: bool) -> None:
    """Switch the quantizers inside ``module`` on or off."""
    for child in module.modules():
        if isinstance(child, QuantLayer):
            child.weights_enabled = weights
        elif isinstance(child, ActivationQuantizer):
            child.enabled = activations


@contextmanager
def switched(module: nn.Module, *, weights: bool, activations: bool) -> Iterator[None]:
    """Switch the quantizers inside ``module`` for the time of a ``with`` block."""
    before: list[tuple[Any, str, bool]] = []
    for child in module.modules():
        if isinstance(child, QuantLayer):
            before.append((child, "weights_enabled", child.weights_enabled))
        elif isinstance(child, ActivationQuantizer):
            before.append((child, "enabled", child.enabled))
    switch(module, weights=weights, activations=activations)
    try:
        yield
    finally:
        for child, attribute, value in before:
            setattr(child, attribute, value)
