"""The folder of an unfinished run: one file per finished unit, and what the run was begun with.

A file is used only if its hash is right, which covers its content and the run that it belongs to. Any other file costs
its unit a second time and nothing else: units are deterministic, so later ones still fit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ptq_tdq import processes
from ptq_tdq.artifacts import IntervalTable
from ptq_tdq.atomic import write_atomic
from ptq_tdq.config import Config
from ptq_tdq.errors import OutputError, ResumeError
from ptq_tdq.files import check_tensors, read_file
from ptq_tdq.intervals import source_class
from ptq_tdq.intervals.auto import FOLLOWING, SIMPLE, TOKEN, Auto
from ptq_tdq.intervals.dynamic import Dynamic, Form, forms
from ptq_tdq.modules import ActivationQuantizer
from ptq_tdq.quantized_model import source_of, table_of
from ptq_tdq.recon.unit import Unit
from ptq_tdq.search import QParams

CHOICES = (SIMPLE, FOLLOWING, TOKEN)  # of "auto"
CHECKPOINT_FORM = 5  # changes with the names and the meaning of the tensors in the files

Tensors = dict[str, Tensor]
Saved = tuple[Tensors, tuple[float, float]]

_SPARE_BYTES = 1 << 24  # of a file, for its header; of run.json, at most

# What safetensors and torch raise for files that are no checkpoints.
_DAMAGE = (OSError, SafetensorError, AttributeError, KeyError, TypeError, ValueError, RuntimeError, AssertionError)


class RunDirectory:
    """``run.json`` with the run's identity (a flat dict), and ``<phase>-<index>.safetensors`` per finished unit.

    Fine-tuning keeps its state as one unit that is written again and again. Of several processes the first alone opens,
    writes and reads; the folder may be on a disk that others do not see.
    """

    def __init__(
        self,
        path: str | Path,
        identity: dict[str, Any],
        *,
        weights: RunDirectory | None = None,
        on_notice: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Open or begin a run; raises :class:`ResumeError` naming the key that differs from the run on disk.

        ``weights`` keeps phase W instead: runs that differ only in phase A share it. ``on_notice`` gets a sentence for
        each file that is damaged.
        """
        self.path, self.on_notice = Path(path), on_notice
        self.identity = json.dumps(identity, sort_keys=True)
        self._homes = {"weights": weights or self}
        processes.of_first(lambda: self._open(identity))

    def _open(self, identity: dict[str, Any]) -> None:
        path = self.path
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"The folder {path} cannot be made ({error.strerror}); choose another output directory."
            ) from None
        record = path / "run.json"
        before = self._read_record(record)
        if before is None:
            signed = {**identity, "sha256": sha256(self.identity.encode()).hexdigest()}
            write_atomic(record, json.dumps(signed, indent=1, sort_keys=True).encode())
            return
        for key in [*identity, *sorted(before.keys() - identity.keys())]:
            if before.get(key) != identity.get(key):
                raise ResumeError(
                    f"The unfinished run in {path} has another {key} ({before.get(key)!r}, now {identity.get(key)!r}); "
                    "start with --no-resume to discard it, or choose another output directory."
                )

    def _read_record(self, record: Path) -> dict[str, Any] | None:
        """The identity in ``run.json``; None where there is none, or, with a notice, none that can be trusted."""
        try:
            before = json.loads(read_file(record, _SPARE_BYTES))
            signature = before.pop("sha256")
            if sha256(json.dumps(before, sort_keys=True).encode()).hexdigest() != signature:
                raise ValueError
        except FileNotFoundError:
            return None
        except (*_DAMAGE, RecursionError):
            self.on_notice(f"{record} is damaged and written again; of its units those count that are of this run.")
            return None
        found: dict[str, Any] = before
        return found

    def _file(self, phase: str, index: int) -> Path:
        return self._home(phase).path / f"{phase}-{index:04d}.safetensors"

    def _home(self, phase: str) -> RunDirectory:
        return self._homes.get(phase, self)

    def _hash(self, phase: str, index: int, tensors: Tensors, losses: str) -> str:
        about = [self._home(phase).identity, phase, index, losses]
        return sha256(json.dumps(about).encode() + save(tensors)).hexdigest()

    def write(self, phase: str, index: int, tensors: Tensors, losses: tuple[float, float]) -> None:
        """Keep a finished unit, in the first process; raises :class:`OutputError` where that is impossible."""
        if processes.rank() > 0:
            return
        tensors, text = {k: v.cpu().contiguous() for k, v in tensors.items()}, json.dumps(losses)
        data = save(tensors, metadata={"losses": text, "sha256": self._hash(phase, index, tensors, text)})
        write_atomic(self._file(phase, index), data)

    def read(
        self, phase: str, index: int, form: Form, sound: Callable[[dict[str, Tensor]], bool] = lambda tensors: True
    ) -> Saved | None:
        """The saved unit with ``sound`` tensors of this ``form``, or None where it has to be done.

        Says so to ``on_notice`` if there is a file. Raises :class:`ResumeError` for a folder in its place. The first
        process reads for all.
        """
        return processes.of_first(lambda: self._read(phase, index, form, sound))

    def _read(self, phase: str, index: int, form: Form, sound: Callable[[dict[str, Tensor]], bool]) -> Saved | None:
        path = self._file(phase, index)
        if path.is_dir():
            raise ResumeError(f"{path} is a folder where a finished unit would be kept; move it away.")
        try:
            check_tensors(path, _SPARE_BYTES + sum(math.prod(shape) * kind.itemsize for kind, shape in form.values()))
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata()
                tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
            if metadata["sha256"] != self._hash(phase, index, tensors, metadata["losses"]):
                raise ValueError
            before, after = map(float, json.loads(metadata["losses"]))
            if forms(tensors) != form or not sound(tensors):
                raise ValueError
        except FileNotFoundError:
            return None
        except _DAMAGE:
            self.on_notice(f"The checkpoint {path} is damaged; what it held is done again.")
            return None
        return tensors, (before, after)


def form_of(unit: Unit, phase: str, config: Config, length: int) -> Form:
    """Types and shapes of the tensors that :func:`snapshot` gives; tables have ``length`` entries."""
    form = forms(_shifts(unit) | _divisors(unit) | _rotations(unit))
    for layer in unit.layers():
        for index in range(len(layer.ranges)):
            part = layer.part(index).shape
            rows = (part[0] if config.weights.weight_granularity == "per_channel" else 1,)
            kinds = {
                "codes": (torch.uint8, tuple(part)),
                "scale": (torch.float32, rows),
                "zero_point": (torch.int32, rows),
            }
            form |= {f"weight.{layer.record.name}.{index}.{key}": kind for key, kind in kinds.items()}
    if phase == "weights":
        return form
    for quantizer in unit.quantizers():
        name = quantizer.record.name
        form |= {f"{name}.static_scale": (torch.float32, ()), f"{name}.static_zero_point": (torch.int32, ())}
        form |= _table_form(quantizer, length)
        if quantizer.record.method == Auto.pattern:
            form |= {f"{name}.choice": (torch.uint8, ()), f"{name}.gain_db": (torch.float64, ())}
    return form


def _table_form(quantizer: ActivationQuantizer, length: int) -> Form:
    cls, name = source_class(quantizer.record.method), quantizer.record.name
    if not issubclass(cls, Dynamic):
        shape = (length,)
        return {f"{name}.scale": (torch.float32, shape), f"{name}.zero_point": (torch.int32, shape)}
    kinds = {f"{name}.generator.{key}": kind for key, kind in cls.form(length).items()}
    return {f"{name}.zero_point": (torch.int32, (1,)), **kinds}


def _table(static: QParams, length: int) -> IntervalTable:
    return IntervalTable(static.scale.expand(length), static.zero_point.expand(length))


def snapshot(unit: Unit, phase: str, static: dict[str, QParams], length: int) -> Tensors:
    """What a phase decided for a unit."""
    tensors = _weights(unit) | _shifts(unit) | _divisors(unit) | _rotations(unit)
    if phase == "weights":
        return tensors
    for quantizer in unit.quantizers():
        name = quantizer.record.name
        tensors[f"{name}.static_scale"] = static[name].scale
        tensors[f"{name}.static_zero_point"] = static[name].zero_point
        if quantizer.record.gain_db is None:
            tensors |= table_of(quantizer).tensors(name)
        else:  # "auto" chose; every choice has the same form
            known = table_of(quantizer) if quantizer.record.method != TOKEN else _table(static[name], length)
            tensors |= known.tensors(name)
            tensors[f"{name}.choice"] = torch.tensor(CHOICES.index(quantizer.record.method), dtype=torch.uint8)
            tensors[f"{name}.gain_db"] = torch.tensor(quantizer.record.gain_db, dtype=torch.float64)
    return tensors


def _weights(unit: Unit) -> Tensors:
    return {
        f"weight.{layer.record.name}.{index}.{key}": getattr(weight, key)
        for layer in unit.layers()
        for index, weight in enumerate(layer.weight_quantizers())
        for key in ("codes", "scale", "zero_point")
    }


def _shifts(unit: Unit) -> Tensors:
    return {f"{layer.record.name}.shift": layer.shift.detach() for layer in unit.layers() if layer.shift is not None}


def _divisors(unit: Unit) -> Tensors:
    """What the input channels of each layer are divided by."""
    return {
        f"{layer.record.name}.divisor": torch.ones(layer.weight.shape[1]) if layer.divisor is None else layer.divisor
        for layer in unit.layers()
        if layer.mixable
    }


def _rotations(unit: Unit) -> Tensors:
    """Whether the input channels of each layer are rotated."""
    return {f"{x.record.name}.rotated": torch.tensor(x.record.rotated) for x in unit.layers() if x.mixable}


def restore(unit: Unit, phase: str, saved: Saved, static: dict[str, QParams], length: int) -> tuple[float, float]:
    """Inverse of :func:`snapshot`; switches the phase's quantizers on and returns the losses."""
    tensors, losses = saved
    with torch.no_grad():
        for name, shift in _shifts(unit).items():
            shift.copy_(tensors[name])
    for layer in unit.layers():
        layer.weights_enabled = True
        if layer.mixable:
            layer.record = replace(layer.record, rotated=bool(tensors[f"{layer.record.name}.rotated"]))
        divisor = tensors.get(f"{layer.record.name}.divisor")
        if layer.divisor is None and divisor is not None and bool((divisor != 1).any()):
            layer.equalize(divisor.to(unit.device))
        for index in range(len(layer.ranges)):
            prefix = f"weight.{layer.record.name}.{index}"
            layer.assign(index, tensors[f"{prefix}.codes"], tensors[f"{prefix}.scale"], tensors[f"{prefix}.zero_point"])
    if phase == "weights":
        return losses
    for quantizer in unit.quantizers():
        name = quantizer.record.name
        static[name] = QParams(tensors[f"{name}.static_scale"], tensors[f"{name}.static_zero_point"])
        table = IntervalTable.take(name, tensors)
        if quantizer.record.method == Auto.pattern:
            method = CHOICES[int(tensors[f"{name}.choice"])]
            quantizer.record = replace(quantizer.record, method=method, gain_db=float(tensors[f"{name}.gain_db"]))
            table = IntervalTable(None, table.zero_point[:1]) if method == TOKEN else table
        quantizer.source = source_of(quantizer, table, length).to(unit.device)
        quantizer.enabled = True
    return losses
