"""The full-precision and the quantized model side by side, on the inputs of full-precision trajectories.

What each activation looks like at each step and for each class, and what each layer loses there. N samples, K steps
of the sampler, L quantized layers, in the order of the artifact's records.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ptq_tdq.evaluate.trajectories import Reference
from ptq_tdq.modules.attention import OPERANDS
from ptq_tdq.observe import Observer
from ptq_tdq.quantized_model import QuantizedModel
from ptq_tdq.records import LayerRecord
from ptq_tdq.search import Histogram
from ptq_tdq.wrap import switched

MAX_CLASSES = 10  # told apart; all classes count in the distribution over t
CHUNK_VALUES = 1 << 15  # of x in one forward pass: all outputs of its layers are in memory at once


@dataclass(frozen=True, eq=False)
class Activation:
    """One quantizer's input in full precision: a histogram row per step [K], and per class and step [C * K].

    ``by_class`` is None without classes; its row ``c * K + k`` is class c at step k.
    """

    by_step: Histogram
    by_class: Histogram | None


Hear = Callable[[int, "_Probe", tuple[Tensor, ...], Tensor], None]


@dataclass(frozen=True, eq=False)
class LayerErrors:
    """SQNR in dB [L, K] of each layer's output; of an attention product before its output projection.

    ``inputs``: only the layer's own inputs are quantized. ``own``: its inputs and weights. ``accumulated``: the whole
    model. All against full precision, from the same x_t; inf where nothing differs. ``prediction`` [K] is the SQNR of
    the predicted noise.
    """

    inputs: Tensor
    own: Tensor
    accumulated: Tensor
    prediction: Tensor


def observe_activations(layers: Sequence[LayerRecord], reference: Reference) -> dict[str, Activation]:
    """Watch the input of every quantizer in the full-precision model, by quantizer name."""
    full = QuantizedModel.copy_of(reference.model.unet, layers)
    steps, groups = len(reference.x), _groups(reference)
    count = 1 if groups is None else int(groups.max()) + 1
    observers = {name: Observer(name, torch.arange(count * steps).float()) for name in full.quantizers()}
    for name, quantizer in full.quantizers().items():
        quantizer.observer = observers[name]
    for counting in (False, True):
        for observer in observers.values() if counting else ():
            observer.start_counting()
        for k, part in _batches(reference):
            rows = torch.zeros(len(reference.x[k][part])) if groups is None else groups[part].float()
            full.clock.set(rows * steps + k)  # the quantizers are off: the clock speaks to the observers alone
            with torch.no_grad():
                full.model(**_inputs(reference, k, part))
    step_of_row = torch.arange(count * steps) % steps
    known = 0 if groups is None else min(count, MAX_CLASSES) * steps
    return {
        name: Activation(whole.pooled(step_of_row, steps), _head(whole, known) if known else None)
        for name, whole in ((name, observer.histogram()) for name, observer in observers.items())
    }


def measure_errors(quantized: QuantizedModel, reference: Reference) -> LayerErrors:
    """Compare every layer of a calibrated model with full precision."""
    full = QuantizedModel.copy_of(reference.model.unet, quantized.plan)
    for name, quantizer in full.quantizers().items():
        quantizer.source = quantized.quantizers()[name].source
    probes: list[_Probe] = [
        _AttentionProbe(r.name, quantized) if r.weight_bits is None else _LayerProbe(r.name, full, quantized)
        for r in full.plan
    ]
    shape = (len(full.plan), len(reference.x))
    inputs, own, accumulated = _Ratios(shape), _Ratios(shape), _Ratios(shape)
    last = _Ratios((1, len(reference.x)))
    expected: dict[int, Tensor] = {}
    for k, part in _batches(reference):

        def in_full(i: int, probe: _Probe, values: tuple[Tensor, ...], output: Tensor, k: int = k) -> None:
            expected[i] = output
            inputs.add(i, k, output, probe.with_quantized_inputs(values))
            own.add(i, k, output, probe.quantized(values))

        def in_quantized(i: int, probe: _Probe, values: tuple[Tensor, ...], output: Tensor, k: int = k) -> None:
            accumulated.add(i, k, expected.pop(i), output)

        arguments = _inputs(reference, k, part)
        quantized.clock.set(arguments["timestep"])
        with torch.no_grad():
            with _watched(full, probes, in_full):
                prediction = full(**arguments)[0]
            with _watched(quantized, probes, in_quantized):
                output = quantized(**arguments)[0]
        last.add(0, k, prediction, output)
    return LayerErrors(inputs.db(), own.db(), accumulated.db(), last.db()[0])


class _Ratios:
    """Energies of signal and error, summed over batches."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self.signal, self.noise = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)

    def add(self, row: int, column: int, expected: Tensor, found: Tensor) -> None:
        self.signal[row, column] += expected.square().sum(dtype=torch.float64)
        self.noise[row, column] += (expected - found).square().sum(dtype=torch.float64)

    def db(self) -> Tensor:
        return 10 * torch.log10(self.signal / self.noise)


class _Probe(ABC):
    """One layer in both models, to be run by itself on the full-precision values that it received."""

    @abstractmethod
    def with_quantized_inputs(self, values: tuple[Tensor, ...]) -> Tensor:
        """Its output when only its inputs are quantized."""

    @abstractmethod
    def quantized(self, values: tuple[Tensor, ...]) -> Tensor:
        """Its output when its inputs and weights are quantized."""


class _LayerProbe(_Probe):
    """A convolution or linear layer; its value is its input x."""

    def __init__(self, name: str, full: QuantizedModel, quantized: QuantizedModel) -> None:
        self.full, self.twin = full.layers()[name], quantized.layers()[name]

    def with_quantized_inputs(self, values: tuple[Tensor, ...]) -> Tensor:
        with switched(self.full, weights=False, activations=True):
            return self.full.forward(values[0])  # not __call__: the hooks have seen it

    def quantized(self, values: tuple[Tensor, ...]) -> Tensor:
        return self.twin.forward(values[0])


class _AttentionProbe(_Probe):
    """An attention product; its values are q, k and v [B, heads, N, d]. It has no weights."""

    def __init__(self, name: str, quantized: QuantizedModel) -> None:
        attention: Any = quantized.model.get_submodule(name)
        self.scale = float(attention.scale)
        self.quantizers = [quantized.quantizers()[f"{name}.{part}"] for part in OPERANDS]

    def with_quantized_inputs(self, values: tuple[Tensor, ...]) -> Tensor:
        return self.quantized(values)

    def quantized(self, values: tuple[Tensor, ...]) -> Tensor:
        q, k, v = (quantizer(x) for quantizer, x in zip(self.quantizers, values, strict=False))
        weights: Tensor = self.quantizers[3]((q @ k.transpose(-1, -2) * self.scale).softmax(-1))
        product: Tensor = weights @ v
        return product.transpose(1, 2).flatten(2)


class _Keep(Observer):
    """Keeps what it sees last."""

    def __init__(self) -> None:
        self.x = torch.empty(0)

    def see(self, x: Tensor, t: Tensor) -> None:
        self.x = x


@contextmanager
def _watched(model: QuantizedModel, probes: list[_Probe], hear: Hear) -> Iterator[None]:
    """Call ``hear(i, probe, values, output)`` for each layer i of ``model`` as it runs."""
    handles: list[RemovableHandle] = []
    layers, quantizers, kept = model.layers(), model.quantizers(), []
    for i, (record, probe) in enumerate(zip(model.plan, probes, strict=True)):
        if record.weight_bits is not None:

            def after(module: nn.Module, args: Any, output: Tensor, i: int = i, probe: _Probe = probe) -> None:
                hear(i, probe, args, output)

            handles.append(layers[record.name].register_forward_hook(after))
            continue
        operands = [_Keep() for _ in OPERANDS[:3]]
        for part, keep in zip(OPERANDS, operands, strict=False):
            quantizer = quantizers[f"{record.name}.{part}"]
            if not quantizer.enabled:  # of the full-precision model; one with an observer does not quantize
                quantizer.observer = keep
                kept.append(quantizer)

        def before(
            module: nn.Module, args: Any, i: int = i, probe: _Probe = probe, seen: list[_Keep] = operands
        ) -> None:
            hear(i, probe, tuple(keep.x for keep in seen), args[0])

        # the product itself is no module; its output is what the output projection receives
        handles.append(model.model.get_submodule(f"{record.name}.to_out.0").register_forward_pre_hook(before))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for quantizer in kept:
            quantizer.observer = None


def _batches(reference: Reference) -> Iterator[tuple[int, slice]]:
    samples = len(reference.noise)
    size = max(1, CHUNK_VALUES // reference.noise[0].numel())
    for k in range(len(reference.x)):
        for start in range(0, samples, size):
            yield k, slice(start, min(start + size, samples))


def _inputs(reference: Reference, k: int, part: slice) -> dict[str, Any]:
    labels = {name: value[part] for name, value in reference.labels().items()}
    return {"sample": reference.x[k][part], "timestep": reference.t[k][part], **labels}


def _groups(reference: Reference) -> Tensor | None:
    """The class of each sample, with all beyond MAX_CLASSES taken together."""
    return None if reference.class_labels is None else reference.class_labels.clamp(max=MAX_CLASSES)


def _head(histogram: Histogram, rows: int) -> Histogram:
    return replace(histogram, counts=histogram.counts[:rows], lo=histogram.lo[:rows], hi=histogram.hi[:rows])
