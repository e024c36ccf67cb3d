"""The folder of an unfinished run: one file per finished unit, and what the run was begun with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ptq_tdq.artifacts import IntervalTable, write_atomic
from ptq_tdq.errors import OutputError, ResumeError
from ptq_tdq.quantized_model import source_of, table_of
from ptq_tdq.recon.unit import Unit
from ptq_tdq.search import QParams

CHECKPOINT_FORM = 2  # changes with the names and the meaning of the tensors in the files

Tensors = dict[str, Tensor]


class RunDirectory:
    """``run.json`` with the run's identity (a flat dict), and ``<phase>-<index>.safetensors`` per finished unit."""

    def __init__(self, path: Path, identity: dict[str, Any], *, weights: RunDirectory | None = None) -> None:
        """Open or begin a run; raises :class:`ResumeError` naming the key that differs from the run on disk.

        ``weights`` keeps phase W instead: runs that differ only in phase A share it.
        """
        self.path = path
        self._homes = {"weights": weights.path if weights else path, "activations": path}
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"The folder {path} cannot be made ({error.strerror}); choose another output directory."
            ) from None
        record = path / "run.json"
        if not record.exists():
            write_atomic(record, json.dumps(identity, indent=1, sort_keys=True).encode())
            return
        try:
            before = json.loads(record.read_text(encoding="utf-8"))
        except ValueError:
            raise ResumeError(f"{record} is damaged; delete {path} or start with --no-resume.") from None
        for key in [*identity, *sorted(before.keys() - identity.keys())]:
            if before.get(key) != identity.get(key):
                raise ResumeError(
                    f"The unfinished run in {path} has another {key} ({before.get(key)!r}, now {identity.get(key)!r}); "
                    "start with --no-resume to discard it, or choose another output directory."
                )

    def _file(self, phase: str, index: int) -> Path:
        return self._homes[phase] / f"{phase}-{index:04d}.safetensors"

    def write(self, phase: str, index: int, tensors: Tensors, losses: tuple[float, float]) -> None:
        data = save({k: v.contiguous() for k, v in tensors.items()}, metadata={"losses": json.dumps(losses)})
        write_atomic(self._file(phase, index), data)

    def read(self, phase: str, index: int) -> tuple[Tensors, tuple[float, float]] | None:
        """The saved unit, or None where it is not finished yet."""
        path = self._file(phase, index)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                before, after = json.loads(file.metadata()["losses"])
                return {key: file.get_tensor(key) for key in file.keys()}, (before, after)  # noqa: SIM118
        except (SafetensorError, KeyError, ValueError) as error:
            raise ResumeError(f"{path} is damaged ({error}); start with --no-resume.") from None

    def finished(self, phase: str, units: int) -> bool:
        """Whether all ``units`` of a phase are there."""
        return all(self._file(phase, index).exists() for index in range(units))


def snapshot(unit: Unit, phase: str, static: dict[str, QParams]) -> Tensors:
    """What a phase decided for a unit."""
    tensors = _weights(unit) | _shifts(unit)
    if phase == "weights":
        return tensors
    for quantizer in unit.quantizers():
        name = quantizer.record.name
        tensors[f"{name}.static_scale"] = static[name].scale
        tensors[f"{name}.static_zero_point"] = static[name].zero_point
        tensors |= table_of(quantizer).tensors(name)
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


def restore(
    unit: Unit, phase: str, saved: tuple[Tensors, tuple[float, float]], static: dict[str, QParams]
) -> tuple[float, float]:
    """Inverse of :func:`snapshot`; switches the phase's quantizers on and returns the losses."""
    tensors, losses = saved
    with torch.no_grad():
        for name, shift in _shifts(unit).items():
            shift.copy_(tensors[name])
    for layer in unit.layers():
        layer.weights_enabled = True
        for index in range(len(layer.ranges)):
            prefix = f"weight.{layer.record.name}.{index}"
            layer.assign(index, tensors[f"{prefix}.codes"], tensors[f"{prefix}.scale"], tensors[f"{prefix}.zero_point"])
    if phase == "weights":
        return losses
    for quantizer in unit.quantizers():
        name = quantizer.record.name
        static[name] = QParams(tensors[f"{name}.static_scale"], tensors[f"{name}.static_zero_point"])
        quantizer.source = source_of(quantizer, IntervalTable.take(name, tensors))
        quantizer.enabled = True
    return losses
