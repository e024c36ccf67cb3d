"""Both phases over all units: W rounds the weights, A learns the activations' intervals, each in execution order."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ptq_tdq.config import Config
from ptq_tdq.quantized_model import QuantizedModel
from ptq_tdq.recon.activations import reconstruct_activations
from ptq_tdq.recon.checkpoint import RunDirectory, Saved, form_of, restore, snapshot
from ptq_tdq.recon.streams import Store, UnitCall, sweep
from ptq_tdq.recon.unit import Unit
from ptq_tdq.recon.weights import reconstruct_weights
from ptq_tdq.search import QParams
from ptq_tdq.wrap import switched

CHUNK = 64
CACHE_BYTES = 2 << 30  # streams larger than this live in memory-mapped files

Phase = Literal["weights", "activations"]


@dataclass(frozen=True)
class UnitReport:
    """One finished unit: its place, its loss before and after, its seconds (0 where a checkpoint was read)."""

    phase: Phase
    index: int
    total: int
    unit: str
    before: float
    after: float
    seconds: float


@dataclass(frozen=True)
class Samples:
    """What the engine needs of a calibration set: x [N, ...], t [N], class labels [N] or None."""

    x: Tensor
    t: Tensor
    class_labels: Tensor | None

    def inputs(self, index: slice) -> dict[str, Any]:
        """Keyword arguments of a forward pass over some samples."""
        labels = {} if self.class_labels is None else {"class_labels": self.class_labels[index]}
        return {"sample": self.x[index], "timestep": self.t[index], **labels}


def reconstruct(
    quantized: QuantizedModel,
    samples: Samples,
    config: Config,
    num_train_timesteps: int,
    *,
    run: RunDirectory | None = None,
    on_unit: Callable[[UnitReport], None] = lambda report: None,
) -> dict[str, QParams]:
    """Quantize all units of the model; leaves its quantizers on, with final codes and interval tables.

    Finished units are kept in ``run`` and read from it. Returns the static interval of each activation quantizer.
    Raises :class:`~ptq_tdq.errors.NonFiniteError` naming the layer and t.
    """
    chunks = [slice(i, min(i + CHUNK, len(samples.x))) for i in range(0, len(samples.x), CHUNK)]
    forwards = [lambda c=c: quantized.model(**samples.inputs(c)) for c in chunks]
    sizes = [c.stop - c.start for c in chunks]
    units = quantized.units()
    store = Store(_stream_bytes(quantized, samples) > CACHE_BYTES)
    static: dict[str, QParams] = {}

    def unit_of(name: str) -> Unit:
        return Unit(name, quantized.model.get_submodule(name), quantized.clock, samples.t)

    def read(phase: Phase, index: int) -> Saved | None:
        form = form_of(unit_of(units[index]), phase, config, num_train_timesteps)
        return run.read(phase, index, form) if run else None

    def pass_over(phase: Phase) -> None:
        # all are read before any is put in place: a unit that has to be done again must find the state it began with
        kept = [read(phase, index) for index in range(len(units))]
        if all(kept):  # nothing is left to learn, so no stream has to flow
            for index, (name, saved) in enumerate(zip(units, kept, strict=True)):
                assert saved is not None
                losses = restore(unit_of(name), phase, saved, static)
                on_unit(UnitReport(phase, index, len(units), name, *losses, 0.0))
            return
        done = 0

        def process(full: UnitCall, mine: UnitCall) -> tuple[Tensor, Tensor]:
            nonlocal done
            began = time.perf_counter()
            unit = unit_of(full.unit)
            with switched(unit.module, weights=False, activations=False):
                target = unit.outputs(full, store)
            saved, kept[done] = kept[done], None
            if saved is None:
                generator = torch.Generator().manual_seed(config.seed * 1_000_003 + done)
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(config.seed * 1_000_003 + done)
                    if phase == "weights":
                        losses = reconstruct_weights(unit, full, mine, target, config, generator)
                    else:
                        seen = mine if config.activation_inputs == "quantized" else full
                        result = reconstruct_activations(
                            unit, full, seen, target, config, generator, num_train_timesteps
                        )
                        losses = result.before, result.after
                        static.update(result.static)
                if run:
                    run.write(phase, done, snapshot(unit, phase, static), losses)
            else:
                losses = restore(unit, phase, saved, static)
            report = UnitReport(
                phase, done, len(units), unit.name, *losses, time.perf_counter() - began if saved is None else 0.0
            )
            done += 1
            on_unit(report)
            return target, unit.outputs(mine, store)

        sweep(quantized.model, units, forwards, sizes, store, process)

    quantized.quantize(weights=False, activations=False)
    pass_over("weights")
    pass_over("activations")
    return static


def _stream_bytes(quantized: QuantizedModel, samples: Samples) -> int:
    """An upper bound of what both streams hold: the outputs of all units for all samples."""
    total = 0

    def count(module: Any, args: Any, output: Tensor) -> None:
        nonlocal total
        total += output[0].numel() * output.element_size()

    handles = [quantized.model.get_submodule(name).register_forward_hook(count) for name in quantized.units()]
    with torch.no_grad():
        quantized.model(**samples.inputs(slice(0, 1)))
    for handle in handles:
        handle.remove()
    return 2 * total * len(samples.x)
