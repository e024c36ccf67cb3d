"""The full-precision and the quantized model side by side, on the calls of full-precision trajectories.

What each activation looks like at each step and for each class or prompt, and what each layer loses there. K time
steps t in ascending order, L quantized layers in the order of the artifact's records.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ptq_tdq.calib_data.collect import Progress
from ptq_tdq.calls import Calls, main_argument, prediction
from ptq_tdq.evaluate.trajectories import Reference
from ptq_tdq.hooks import hooked
from ptq_tdq.observe import Observer
from ptq_tdq.quantized_model import QuantizedModel
from ptq_tdq.records import LayerRecord
from ptq_tdq.search import Histogram
from ptq_tdq.timed_model import in_float32
from ptq_tdq.wrap import switched

MAX_GROUPS = 10  # classes or prompts that are told apart; all count in the distribution over t
CHUNK_VALUES = 1 << 15  # of x in one forward pass: all outputs of its layers are in memory at once


@dataclass(frozen=True, eq=False)
class Activation:
    """One quantizer's input in full precision: a histogram row per step [K], and per group and step [G * K].

    The groups are those of :func:`groups_of`; row ``g * K + k`` of ``by_group`` is group g at step k. Without groups it
    is None.
    """

    by_step: Histogram
    by_group: Histogram | None


@dataclass(frozen=True, eq=False)
class LayerErrors:
    """SQNR in dB [L, K] of the output of each layer and attention product, over all its uses in a call.

    ``inputs``: only the layer's own inputs are quantized. ``own``: its inputs and weights. ``accumulated``: the whole
    model. All against full precision, on the same calls; inf where nothing differs, NaN where the layer did not run.
    ``prediction`` [K] is the SQNR of what the denoiser predicts.
    """

    inputs: Tensor
    own: Tensor
    accumulated: Tensor
    prediction: Tensor


def groups_of(reference: Reference) -> list[Any]:
    """The first :data:`MAX_GROUPS` conditions of the samples (classes, prompts); none where all are the same."""
    found = list(dict.fromkeys(reference.conditions))
    return found[:MAX_GROUPS] if len(found) > 1 else []


def observe_activations(
    layers: Sequence[LayerRecord], reference: Reference, on_progress: Progress | None = None
) -> dict[str, Activation]:
    """Watch the input of every quantizer in the full-precision model, by quantizer name; those that ran.

    ``on_progress(done, total)`` counts rows, each twice.
    """
    full, calls = _full_precision(layers, reference, reference.calls)
    steps, known = len(calls.t.unique()), groups_of(reference)
    place = {condition: g for g, condition in enumerate(known)}
    # the last group holds all other samples, and rows that belong to no sample
    group = torch.tensor([place.get(condition, len(known)) for condition in reference.conditions])
    taps = {name: _Tap(name, torch.arange((len(known) + 1) * steps).float()) for name in full.quantizers()}
    for name, quantizer in full.quantizers().items():
        quantizer.observer = taps[name]
    for counting in (False, True):
        if counting:
            taps = {name: tap for name, tap in taps.items() if tap.ran}
            for tap in taps.values():
                tap.start_counting()
        for k, rows, arguments in _batches(calls, on_progress, 2, counting):
            for tap in taps.values():
                tap.begin(group[calls.trajectory[rows]] * steps + k, len(known) * steps + k)
            with torch.no_grad():
                full(**arguments)
    step_of_row = torch.arange((len(known) + 1) * steps) % steps
    return {
        name: Activation(whole.pooled(step_of_row, steps), _head(whole, len(known) * steps) if known else None)
        for name, whole in ((name, tap.histogram()) for name, tap in taps.items())
    }


def measure_errors(quantized: QuantizedModel, reference: Reference, on_progress: Progress | None = None) -> LayerErrors:
    """Compare every layer of a calibrated model with full precision; ``on_progress(done, total)`` counts rows."""
    full, calls = _full_precision(quantized.plan, reference, replace(reference.calls, axis=quantized.axis))
    every = quantized.quantizers()
    for name, quantizer in full.quantizers().items():
        quantizer.source = every[name].source
    layers, twins = (
        [model.model.get_submodule(record.name) for record in quantized.plan] for model in (full, quantized)
    )
    as_taken: Callable[[Any], Any] = in_float32 if quantized.all_float32 else lambda values: values
    steps = len(calls.t.unique())
    inputs, own, accumulated = (_Ratios(len(layers), steps) for _ in range(3))
    last = _Ratios(1, steps)
    outputs: dict[int, deque[Tensor]] = defaultdict(deque)  # of each layer in full precision, one per use
    for k, _, arguments in _batches(calls, on_progress):

        def in_full(i: int, args: Any, kwargs: Any, output: Tensor, k: int = k) -> None:
            outputs[i].append(output.to(torch.float32, copy=True))  # what follows may write into it
            with switched(layers[i], weights=False, activations=True):
                inputs.add(i, k, output, layers[i].forward(*args, **kwargs))  # not __call__: hooks have heard of it
            own.add(i, k, output, twins[i].forward(*as_taken(args), **as_taken(kwargs)))

        def in_quantized(i: int, args: Any, kwargs: Any, output: Tensor, k: int = k) -> None:
            if outputs[i]:
                accumulated.add(i, k, outputs[i].popleft(), output)

        with torch.no_grad():
            with _listened(layers, in_full):
                expected = prediction(full(**arguments))
            with _listened(twins, in_quantized):
                last.add(0, k, expected, prediction(quantized(**arguments)))
        outputs.clear()
    return LayerErrors(inputs.db(), own.db(), accumulated.db(), last.db()[0])


class _Tap(Observer):
    """Observes a quantizer's input by the group and the step of each row, instead of its t."""

    ran = False

    def begin(self, codes: Tensor, other: int) -> None:
        """What follows is a call whose samples belong to ``codes`` [B]; rows of no sample count as ``other``."""
        self._codes, self._other = codes, other

    def see(self, x: Tensor, t: Tensor) -> None:
        if not x.numel():
            return
        self.ran = True
        times, rest = divmod(len(x), len(self._codes))
        codes = torch.full((len(x),), self._other) if rest else self._codes.repeat_interleave(times)
        super().see(x.cpu(), codes)


class _Ratios:
    """Energies of signal and error, summed over batches."""

    def __init__(self, rows: int, columns: int) -> None:
        self.signal, self.noise = (torch.zeros(rows, columns, dtype=torch.float64) for _ in range(2))

    def add(self, row: int, column: int, expected: Tensor, found: Tensor) -> None:
        """Add one pair of outputs; of a layer that chose other rows (experts) there is nothing to compare."""
        if expected.shape == found.shape:
            self.signal[row, column] += expected.float().square().sum(dtype=torch.float64).cpu()
            self.noise[row, column] += (expected.float() - found.float()).square().sum(dtype=torch.float64).cpu()

    def db(self) -> Tensor:
        return 10 * torch.log10(self.signal / self.noise)


def _full_precision(layers: Sequence[LayerRecord], reference: Reference, calls: Calls) -> tuple[QuantizedModel, Calls]:
    """The original with quantizers that are switched off, and the calls on its device."""
    full = QuantizedModel.copy_of(reference.model.denoiser, calls.axis, layers)
    return full, calls.to(full.device)


@contextmanager
def _listened(modules: Sequence[nn.Module], on_output: Callable[[int, Any, Any, Tensor], None]) -> Iterator[None]:
    """Call ``on_output(i, args, kwargs, output)`` whenever module i has run."""

    def hook(i: int) -> Callable[..., None]:
        return lambda module, args, kwargs, output: on_output(i, args, kwargs, output)

    with hooked(module.register_forward_hook(hook(i), with_kwargs=True) for i, module in enumerate(modules)):
        yield


def _batches(
    calls: Calls, on_progress: Progress | None = None, passes: int = 1, before: int = 0
) -> Iterator[tuple[int, Tensor, dict[str, Any]]]:
    """Step, rows and arguments of calls that are small, and of one step each; ``before`` of ``passes`` are done.

    So there is one t for layers whose rows are not told apart by sample (experts, layouts with the sequence first).
    """
    step, done = calls.t.cpu().unique(return_inverse=True)[1], before * len(calls)
    for _, span in calls.spans():
        arguments = calls.inputs(slice(span.start, span.start + 1))
        leaves = pytree.tree_leaves(arguments[main_argument(arguments, calls.axis.argument)])
        size = max(1, CHUNK_VALUES // sum(leaf.numel() for leaf in leaves if isinstance(leaf, Tensor)))
        for k in step[span].unique().tolist():
            for rows in (span.start + (step[span] == k).nonzero().flatten()).split(size):
                yield k, rows, calls.inputs(rows)
                done += len(rows)
                if on_progress is not None:
                    on_progress(done, passes * len(calls))


def _head(histogram: Histogram, rows: int) -> Histogram:
    return replace(histogram, counts=histogram.counts[:rows], lo=histogram.lo[:rows], hi=histogram.hi[:rows])
