"""The quantized model while it learns, and what it becomes afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ptq_tdq.affine import fake_quantize
from ptq_tdq.ambient import products_in
from ptq_tdq.calls import prediction, tensors_of
from ptq_tdq.finetuning.config import FinetuneConfig
from ptq_tdq.finetuning.quantizers import Quantizer, quantizer_class
from ptq_tdq.finetuning.sources import is_held
from ptq_tdq.hooks import first_where
from ptq_tdq.intervals import IntervalSource
from ptq_tdq.intervals.mlp import ModuleInterval
from ptq_tdq.intervals.together import join
from ptq_tdq.modules import ActivationQuantizer, QuantLayer
from ptq_tdq.modules.layers import outputs_first, own_weight
from ptq_tdq.quantized_model import QuantizedModel
from ptq_tdq.recon import activations
from ptq_tdq.rotate import rotated
from ptq_tdq.rounding import LearnedWeight


class Student(nn.Module):
    """``quantized``, whose sources are at their start, with weights that learn; it changes that model itself.

    Weights begin at those of the full-precision model ``base``, as far as the codes of the artifact allow; biases and
    all that is not quantized begin at the artifact's. So at the start the student is the model of the artifact. All of
    it learns in float32, and has the artifact's dtypes again when it is finished.
    """

    def __init__(self, quantized: QuantizedModel, base: nn.Module, config: FinetuneConfig) -> None:
        super().__init__()
        self.quantized, self.compute_dtype = quantized, getattr(torch, config.compute_dtype)
        self.dtypes = {name: x.dtype for name, x in _floating(quantized.model)}
        quantized.float()
        for name, layer in quantized.layers().items():
            _begin_weight(layer, own_weight(base.get_submodule(name)))
        weighted = {id(q) for layer in quantized.layers().values() for q in layer.activation_quantizers()}
        self.functions: dict[str, Quantizer] = {}
        for name, quantizer in quantized.quantizers().items():
            function = quantizer_class(config.quantizer)(id(quantizer) in weighted, is_held(quantizer.record))
            self.functions[name] = quantizer.function = function
        join(source for source in self.sources() if isinstance(source, ModuleInterval))
        self.extra = nn.ParameterList(p for f in self.functions.values() for p in f.learned())
        self.extra.to(quantized.device)
        for parameter in self.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        self.layers = tuple(quantized.layers().values())  # to be found once, not in each iteration
        for layer in self.layers:
            own_weight(layer.layer).requires_grad_(False)  # what the codes stood for; ``rounding`` learns
        self._told: bool | None = None  # by freeze, which walks through all modules
        self.freeze(False)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Prediction [B, ...] for the arguments of one call, float32, and what its quantizers add to the loss."""
        for function in self.functions.values():
            function.penalty = None
        weights = (layer.weight for layer in self.layers)
        with products_in(self.compute_dtype, weights, self.quantized.device):
            predicted = prediction(self.quantized(*args, **kwargs)).float()
        penalties = [f.penalty for f in self.functions.values() if f.penalty is not None]
        return predicted, torch.stack(penalties).sum() if penalties else predicted.new_zeros(())

    def sources(self) -> Iterator[IntervalSource]:
        return (q.source for q in self.quantized.quantizers().values() if q.source is not None)

    def learned(self) -> dict[str, nn.Parameter]:
        """All that learns, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def groups(self, config: FinetuneConfig) -> list[dict[str, Any]]:
        """All that learns for an optimizer, by the rate that it learns with; only weights decay."""
        rates: dict[int, str] = {id(p): "interval_lr" for p in self.extra}
        for source in self.sources():
            rates |= {id(p): "module_lr" for p in source.parameters()}
            rates |= {id(p): "interval_lr" for p in source.raw_parameters()}
        weights = [module for module in self.modules() if isinstance(module, LearnedWeight)]
        rates |= {id(w.log_scale): "scale_lr" for w in weights}
        decays = {id(w.weight) for w in weights}
        found: dict[tuple[str, bool], list[nn.Parameter]] = {}
        for p in self.learned().values():
            found.setdefault((rates.get(id(p), "weight_lr"), id(p) in decays), []).append(p)
        return [
            {"params": params, "lr": getattr(config, rate), "weight_decay": config.weight_decay if decay else 0.0}
            for (rate, decay), params in found.items()
        ]

    def freeze(self, frozen: bool = True) -> None:
        """Begin the last part of the iterations, for quantizers that freeze: no dropout in their networks either."""
        if frozen == self._told:
            return
        self._told = frozen
        for name, quantizer in self.quantized.quantizers().items():
            function = self.functions[name]
            function.frozen = frozen and function.freezes
            if quantizer.source is not None:
                quantizer.source.train(not function.frozen)

    @property
    def frozen(self) -> bool:
        return any(function.frozen for function in self.functions.values())

    @contextmanager
    def judged(self) -> Iterator[None]:
        """Run as the finished model will."""
        before = self.frozen
        self.freeze()
        for source in self.sources():
            source.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.freeze(before)

    def first_to_overflow(self, arguments: dict[str, Any]) -> str | None:
        """The first layer that gives NaN, Inf or numbers whose squares are, in a call, if there is one."""
        modules = ((name, module) for name, module in self.quantized.model.named_modules() if name)

        def overflows(output: Any) -> bool:
            return not all(bool(x.float().square().isfinite().all()) for x in tensors_of(output))

        return first_where(modules, overflows, lambda: self(**arguments))

    def finish(self) -> QuantizedModel:
        """What was learned, as codes and tables; raises :class:`NonFiniteError` for intervals beyond float32."""
        with torch.no_grad():
            for layer in self.layers:
                _end_weight(layer)
        for name, tensor in _floating(self.quantized.model):
            tensor.data = tensor.detach().to(self.dtypes.get(name, tensor.dtype))
        for name, quantizer in self.quantized.quantizers().items():
            _end_interval(quantizer, self.functions[name], self.quantized.axis.num_train_timesteps)
        self.quantized.requires_grad_(False)
        return self.quantized.finalize()


def _floating(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers of floating dtypes."""
    return ((name, x) for name, x in chain(model.named_parameters(), model.named_buffers()) if x.is_floating_point())


def _begin_weight(layer: QuantLayer, weight: Tensor) -> None:
    """Let a layer learn its weight, from the full-precision one in the layer's own form."""
    own = weight.detach().to(own_weight(layer.layer).device, torch.float32)
    if layer.divisor is not None:
        own = own * layer.divisor
    if layer.record.rotated:
        own = rotated(own)
    whole = outputs_first(layer.layer, own)
    for (low, high), quantizer in zip(layer.ranges, layer.weight_quantizers(), strict=True):
        assert quantizer.codes is not None
        quantizer.rounding = LearnedWeight(whole[:, low:high], quantizer.codes, *quantizer.grid(), quantizer.qtype)
    layer.finished = False


def _end_interval(quantizer: ActivationQuantizer, function: Quantizer, num_train_timesteps: int) -> None:
    """The table that a quantizer has learned; a shift of its interval goes into the zero points."""
    source: Any = quantizer.source
    source.eval()
    activations.freeze(quantizer, num_train_timesteps)
    if function.shift is not None:
        source = quantizer.source
        source.zero_point = function.moved(source.zero_point, quantizer.qtype).detach().to(torch.int32)
    quantizer.function = fake_quantize


def _end_weight(layer: QuantLayer) -> None:
    """The codes and scales that a layer has learned; a factor of its input goes into the scales."""
    functions: list[Any] = [q.function for q in layer.activation_quantizers()] or [None] * len(layer.ranges)
    for index, (quantizer, function) in enumerate(zip(layer.weight_quantizers(), functions, strict=True)):
        learned, ratio = quantizer.rounding, getattr(function, "ratio", None)
        assert isinstance(learned, LearnedWeight) and quantizer.zero_point is not None
        scale = learned.scale() if ratio is None else learned.scale() * ratio.exp()
        layer.assign(index, learned.hard_codes(), scale.flatten(), quantizer.zero_point)
