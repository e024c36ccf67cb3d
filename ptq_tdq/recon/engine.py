"""Both phases over all units: W rounds the weights, A learns the activations' intervals, each in execution order."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch

from ptq_tdq import processes
from ptq_tdq.calls import Calls
from ptq_tdq.config import Config
from ptq_tdq.errors import CalibrationSetError, ModelError
from ptq_tdq.intervals import Observed
from ptq_tdq.plan import Special
from ptq_tdq.quantized_model import QuantizedModel
from ptq_tdq.recon.activations import ActivationResult, observe, reconstruct_activations
from ptq_tdq.recon.checkpoint import RunDirectory, Saved, form_of, restore, snapshot
from ptq_tdq.recon.parts import Parts, Store
from ptq_tdq.recon.size import UnitSize, at_once, stream_bytes, unit_sizes
from ptq_tdq.recon.streams import Chunk, UnitCall, layouts, rehearse, sweep
from ptq_tdq.recon.transform import transform_unit
from ptq_tdq.recon.unit import Unit
from ptq_tdq.recon.weights import WeightResult, reconstruct_weights
from ptq_tdq.records import LayerRecord
from ptq_tdq.search import QParams
from ptq_tdq.wrap import switched

CHUNK = 64
CACHE_BYTES = 2 << 30  # streams larger than this live in memory-mapped files, where nothing else is said
ORDINARY = Special()
JUDGES = 8  # one in so many trajectories is held out

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


def reconstruct(
    quantized: QuantizedModel,
    calls: Calls,
    config: Config,
    *,
    special: Special = ORDINARY,
    run: RunDirectory | None = None,
    budget: int = CACHE_BYTES,
    on_unit: Callable[[UnitReport], None] = lambda report: None,
) -> dict[str, QParams]:
    """Quantize all units of the model; leaves its quantizers on, with final codes and interval tables.

    Of the ``special`` units those in ``single`` run with one time step at a time, those in ``unlearned`` keep first
    intervals and nearest rounding; so do those in ``repeated``, whose intervals are observed in all runs of a call.
    Finished units are kept in ``run`` and read from it. Streams of more than ``budget`` bytes are kept in memory-mapped
    files, in the folder of the run; so many bytes may wait inside a unit, and more is computed again. Returns the
    static interval of each activation quantizer.
    Raises :class:`~ptq_tdq.errors.ModelError` before the first unit for rows that follow from values, and
    :class:`~ptq_tdq.errors.NonFiniteError` naming the layer and t.
    """
    engine = _Engine(quantized, calls, config, special, run, budget, on_unit)
    quantized.quantize(weights=False, activations=False)
    if special.single:
        rehearse(quantized.model, engine.units, calls)
    engine.pass_over("weights")
    engine.pass_over("activations")
    quantized.plan = _as_chosen(quantized)
    return engine.static


def _as_chosen(quantized: QuantizedModel) -> tuple[LayerRecord, ...]:
    """The records with the methods that phase A chose for their quantizers, and the rotations that phase W did."""
    chosen = {name: quantizer.record for name, quantizer in quantized.quantizers().items()}
    rotated = {name for name, layer in quantized.layers().items() if layer.record.rotated}
    return tuple(
        replace(record, inputs=tuple(chosen[q.name] for q in record.inputs), rotated=record.name in rotated)
        for record in quantized.plan
    )


def _share(calls: Calls, most: int) -> tuple[list[slice], slice]:
    """The pieces of the calibration set that this process's model runs at once, and their rows.

    No batch of up to ``most`` rows, a power of two, is cut where there are so many for each process: it gives the very
    same numbers then, wherever it runs. Raises :class:`CalibrationSetError` for less than a row for each process.
    """
    each = len(calls) // processes.count()
    if not each:
        raise CalibrationSetError(
            f"{len(calls)} recorded calls cannot be shared by {processes.count()} processes; start fewer."
        )
    mine = processes.share(len(calls), whole=min(most, 1 << each.bit_length() - 1))
    pieces = [slice(max(x.start, mine.start), min(x.stop, mine.stop)) for x in calls.chunks(CHUNK)]
    return [piece for piece in pieces if piece.start < piece.stop], mine


class _Engine:
    """One run over all units of a model."""

    def __init__(
        self,
        quantized: QuantizedModel,
        calls: Calls,
        config: Config,
        special: Special,
        run: RunDirectory | None,
        budget: int,
        on_unit: Callable[[UnitReport], None],
    ) -> None:
        self.quantized, self.calls, self.config, self.run, self.on_unit = quantized, calls, config, run, on_unit
        self.t, self.special, self.observed = calls.t.cpu(), special, dict[str, dict[str, Observed]]()
        self.units = quantized.units()
        self.device = quantized.device
        self.sizes = unit_sizes(quantized, calls.inputs(slice(0, 1)))
        self.pieces, self.mine = _share(calls, max(map(self.most, self.units)))
        on_disk = stream_bytes(self.sizes, self.mine.stop - self.mine.start) > budget
        self.budget, self.store = budget, Store(on_disk, self.device, run.path if run else None)
        self.static: dict[str, QParams] = {}
        number = calls.trajectory.cpu().unique(return_inverse=True)[1]
        count = int(number.max()) + 1
        self.held_out = number >= count - count // JUDGES  # in a row: thinned trajectories take turns at the steps

    def unit(self, name: str, spans: tuple[slice, ...] = ()) -> Unit:
        module = self.quantized.model.get_submodule(name)
        return Unit(
            name, module, self.t, spans, name in self.special.single, self.device, self.held_out, most=self.most(name),
            waiting=self.sizes.get(name, UnitSize()).waiting(self.budget), mine=self.mine, store=self.store,
        )  # fmt: skip

    def most(self, name: str) -> int:
        """Samples that a unit runs with."""
        return at_once(self.sizes.get(name, UnitSize()))

    def pass_over(self, phase: Phase) -> None:
        """Both streams through all units, each of which is learned or restored when its turn comes."""
        # all are read before any is put in place: a unit that has to be done again must find the state it began with
        kept = [self.read(phase, index, name) for index, name in enumerate(self.units)]
        if all(kept):  # nothing is left to learn, so no stream has to flow
            for index, (name, saved) in enumerate(zip(self.units, kept, strict=True)):
                assert saved is not None
                self.restore(phase, index, self.unit(name), saved)
            return
        if phase == "activations":
            self.observed = {name: self.observe(name) for name in self.units if name in self.special.repeated}
        done: list[str] = []

        def process(full: UnitCall, mine: UnitCall) -> tuple[Parts, Parts]:
            unit = self.unit(full.unit, mine.spans)
            with switched(unit.module, weights=False, activations=False):
                target = unit.require_finite(unit.outputs(full))
            outputs = None
            if unit.name not in done:  # a unit that the model calls again has learned on its first call
                index = len(done)
                saved, kept[index] = kept[index], None
                if saved is None:
                    outputs = self.learn(phase, index, unit, full, mine, target)
                else:
                    self.restore(phase, index, unit, saved)
                done.append(unit.name)
            outputs = unit.require_finite(outputs or unit.outputs(mine))
            for layer in unit.layers():
                layer.forget()
            return target, outputs

        sweep(self.quantized.model, self.units, self.chunks(), self.store, process)
        if missed := [name for name in self.units if name not in done]:
            raise ModelError(
                f"{missed[0]} is reached by calls of one sample and by none of several with different time steps, as "
                "the calibration's are; skip it (choice 'skip')."
            )

    def observe(self, name: str) -> dict[str, Observed]:
        """What a unit's quantizers see in whole calls of the model."""

        def run() -> None:
            for piece in self.pieces:
                self.quantized(**self.calls.inputs(piece))

        unit, steps = self.unit(name), self.calls.axis.num_train_timesteps
        return observe(unit.quantizers(), unit.t.unique(), self.config.intervals, steps, run)

    def chunks(self) -> list[Chunk]:
        """This process's pieces of the calibration set, with what runs the model over each."""
        model, calls = self.quantized.model, self.calls
        of_groups = layouts(model, self.units, calls)
        groups = [(span.stop, found) for (_, span), found in zip(calls.spans(), of_groups, strict=True)]
        return [
            (
                partial(lambda chunk: model(**calls.inputs(chunk)), chunk),
                chunk,
                next(found for stop, found in groups if chunk.stop <= stop),
            )
            for chunk in self.pieces
        ]

    def read(self, phase: Phase, index: int, name: str) -> Saved | None:
        """The unit's checkpoint, if there is one."""
        if self.run is None:
            return None
        return self.run.read(phase, index, form_of(self.unit(name), phase, self.config, self.calls.axis.length))

    def restore(self, phase: Phase, index: int, unit: Unit, saved: Saved) -> None:
        """Take the unit from its checkpoint."""
        losses = restore(unit, phase, saved, self.static, self.calls.axis.length)
        self.on_unit(UnitReport(phase, index, len(self.units), unit.name, *losses, 0.0))

    def learn(
        self, phase: Phase, index: int, unit: Unit, full: UnitCall, mine: UnitCall, target: Parts
    ) -> Parts | None:
        """One phase of one unit, with generators of its own, so that a resumed run equals an uninterrupted one.

        Returns the unit's outputs in the quantized stream, where they are known.
        """
        began = time.perf_counter()
        config = self.config
        if unit.name in self.special.unlearned | self.special.repeated:
            config = config.changed({"rounding": "nearest", "activation_iterations": 0})
        seed = self.config.seed * 1_000_003 + index
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(seed)
            if phase == "weights":
                if self.config.weights.equalize == "channels" or self.config.weights.rotate == "auto":
                    transform_unit(unit, mine, self.config, generator)
                result: WeightResult | ActivationResult = reconstruct_weights(
                    unit, full, mine, target, config, generator
                )
                outputs = result.outputs
            else:
                seen = mine if self.config.activations.activation_inputs == "quantized" else full
                steps = self.calls.axis.num_train_timesteps
                observed = self.observed.get(unit.name)
                result = reconstruct_activations(unit, full, seen, target, config, generator, steps, observed)
                outputs = result.outputs if seen is mine else None
                self.static.update(result.static)
        losses = result.before, result.after
        if self.run:
            self.run.write(phase, index, snapshot(unit, phase, self.static, self.calls.axis.length), losses)
        self.on_unit(UnitReport(phase, index, len(self.units), unit.name, *losses, time.perf_counter() - began))
        return outputs
