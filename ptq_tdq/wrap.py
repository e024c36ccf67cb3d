"""Puts quantizers into a model by its plan, and switches them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ptq_tdq.errors import ModelError, NonFiniteError
from ptq_tdq.modules import ActivationQuantizer, QuantLayer
from ptq_tdq.modules.products import QuantProduct, attach, owner_of
from ptq_tdq.records import LayerRecord


def insert(model: nn.Module, record: LayerRecord) -> None:
    """Put the quantizers of one record into ``model``, switched off.

    Raises :class:`ModelError` where the model has no such layer, :class:`NonFiniteError` for NaN or Inf in its weights.
    """
    if record.kind == "product":
        attach(_find(model, owner_of(record.name)[0]), QuantProduct(record))
        return
    parent, _, own = record.name.rpartition(".")
    module = _find(model, record.name)
    for key, value in module.named_parameters():
        if not bool(torch.isfinite(value).all()):
            raise NonFiniteError(f"{record.name} has NaN or Inf in its {key}; repair the model before quantizing it.")
    setattr(model.get_submodule(parent), own, QuantLayer(module, record))


def _find(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise ModelError(f"The model has no layer named {name!r}; it is not the model of this plan.") from None


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
