"""Puts quantizers into a model by its plan, and carries the model's own time step to them."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from ptq_tdq.errors import ModelError, NonFiniteError
from ptq_tdq.modules import ActivationQuantizer, QuantAttnProcessor, QuantLayer
from ptq_tdq.plan import require_timestep
from ptq_tdq.records import LayerRecord
from ptq_tdq.timeaxis import Clock


class QuantizedModel(nn.Module):
    """A model with quantizers in it and the original's call signature (``pipe.unet = quantized``).

    The activations' intervals follow each sample's time step, taken from the model's own ``timestep`` argument.
    ``config``, ``dtype`` and ``device`` are those of the wrapped ``model``.
    """

    def __init__(self, model: nn.Module, plan: Iterable[LayerRecord]) -> None:
        super().__init__()
        require_timestep(model)
        self.model, self.plan, self.clock = model, tuple(plan), Clock()
        self._signature = inspect.signature(model.forward)
        for record in self.plan:
            self._insert(record)

    def _insert(self, record: LayerRecord) -> None:
        try:
            module = self.model.get_submodule(record.name)
        except AttributeError:
            raise ModelError(f"The model has no layer named {record.name!r}; it is not the model of this plan.") from None
        if isinstance(module, Attention):
            module.set_processor(QuantAttnProcessor(module.processor, record, self.clock))
            return
        for key, value in module.named_parameters():
            if not bool(torch.isfinite(value).all()):
                raise NonFiniteError(f"{record.name} has NaN or Inf in its {key}; repair the model before quantizing it.")
        parent, _, own = record.name.rpartition(".")
        setattr(self.model.get_submodule(parent), own, QuantLayer(module, record, self.clock))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped model's forward; raises :class:`~ptq_tdq.errors.TimestepError` for t outside the tables."""
        self.clock.set(self._signature.bind(*args, **kwargs).arguments["timestep"])
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

    def layers(self) -> dict[str, QuantLayer]:
        """Quantized layers by name, in execution order."""
        found = {m.record.name: m for m in self.model.modules() if isinstance(m, QuantLayer)}
        return {r.name: found[r.name] for r in self.plan if r.name in found}

    def quantizers(self) -> dict[str, ActivationQuantizer]:
        """Activation quantizers by name, in execution order."""
        found = {m.record.name: m for m in self.model.modules() if isinstance(m, ActivationQuantizer)}
        return {q.name: found[q.name] for r in self.plan for q in r.inputs}

    def units(self) -> list[str]:
        """Names of the reconstruction units, in execution order."""
        return list(dict.fromkeys(record.unit for record in self.plan))

    def quantize(self, *, weights: bool, activations: bool) -> QuantizedModel:
        """Switch all quantizers; returns the model itself."""
        switch(self.model, weights=weights, activations=activations)
        return self

    def float_state(self) -> dict[str, Tensor]:
        """All tensors that stay in floating point, under the original model's names."""
        state = {}
        quantized = tuple(f"{name}." for name in self.layers())
        for key, value in self.model.state_dict().items():
            if not key.startswith(quantized):
                if ".processor." not in key:
                    state[key] = value
            elif key.endswith(".layer.bias"):
                state[key.replace(".layer.bias", ".bias")] = value
        return state


def switch(module: nn.Module, *, weights: bool | None = None, activations: bool | None = None) -> None:
    """Switch the quantizers inside ``module`` on or off; None leaves a kind as it is."""
    for child in module.modules():
        if isinstance(child, QuantLayer) and weights is not None:
            child.weights_enabled = weights
        elif isinstance(child, ActivationQuantizer) and activations is not None:
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


def quantized_copy(model: nn.Module, plan: Iterable[LayerRecord]) -> QuantizedModel:
    """A quantized model around a deep copy, quantizers off; the given model is left as it is."""
    return QuantizedModel(copy.deepcopy(model).eval().requires_grad_(False), plan)
