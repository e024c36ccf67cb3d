"""Recorded calls as rows: what a calibration set is."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ptq_tdq.atomic import write_atomic
from ptq_tdq.calls import file
from ptq_tdq.calls.arguments import Group, Place, Rows, join
from ptq_tdq.errors import CalibrationSetError, TimestepError
from ptq_tdq.timeaxis import TimeAxis

# What a header raises that nobody wrote for its tensors.
_ALTERED = (LookupError, TypeError, ValueError, AttributeError, AssertionError, RuntimeError, MemoryError)


@dataclass
class Calls:
    """Recorded calls of a denoiser, as N rows: a calibration set.

    ``axis`` says how the model's time argument becomes the scheduler's time step t, ``recipe`` how the calls were made
    (plain JSON values). ``trajectory`` int64 [N] numbers the trajectories (the samples) that the rows belong to.
    Filled by :func:`ptq_tdq.record`; read by :meth:`inputs`.
    """

    axis: TimeAxis
    groups: list[Group] = field(default_factory=list)
    recipe: dict[str, Any] = field(default_factory=dict)
    trajectory: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))

    @classmethod
    def join(cls, parts: Sequence[Calls], axis: TimeAxis, recipe: dict[str, Any] | None = None) -> Calls:
        """The rows of all parts, group by group in the order of their first rows."""
        groups: list[list[Group]] = []
        trajectories: list[list[Tensor]] = []
        for part in parts:
            for group, span in part.spans():
                place = next((i for i, known in enumerate(groups) if known[0].joinable(group)), len(groups))
                if place == len(groups):
                    groups.append([])
                    trajectories.append([])
                groups[place].append(group)
                trajectories[place].append(part.trajectory[span])
        trajectory = torch.cat([t for of in trajectories for t in of]) if groups else torch.empty(0, dtype=torch.int64)
        return cls(axis, [join(of) for of in groups], recipe or {}, trajectory)

    def __len__(self) -> int:
        return sum(map(len, self.groups))

    def spans(self) -> Iterator[tuple[Group, slice]]:
        """Each group with the numbers of its rows."""
        start = 0
        for group in self.groups:
            yield group, slice(start, start + len(group))
            start += len(group)

    def chunks(self, size: int) -> list[slice]:
        """Rows in pieces of at most ``size``, never across groups."""
        return [
            slice(i, min(i + size, span.stop)) for _, span in self.spans() for i in range(span.start, span.stop, size)
        ]

    def inputs(self, index: Rows) -> dict[str, Any]:
        """Keyword arguments of one call with some rows, all of one group."""
        first = index.start or 0 if isinstance(index, slice) else int(index[0])
        for group, span in self.spans():
            if span.start <= first < span.stop:
                if isinstance(index, slice):
                    return group.arguments(slice(first - span.start, index.stop - span.start))
                return group.arguments(index - span.start)
        raise IndexError(first)

    @property
    def t(self) -> Tensor:
        """The scheduler's time step of each row, float32 [N]."""
        found = [self.axis.t(group.leaf(self.axis.argument)) for group in self.groups]
        return torch.cat(found) if found else torch.empty(0)

    def select(self, index: Tensor) -> Calls:
        """The rows ``index`` (ascending) as calls of their own."""
        groups = []
        for group, span in self.spans():
            inner = index[(index >= span.start) & (index < span.stop)] - span.start
            if len(inner):
                groups.append(group.take(inner))
        return Calls(self.axis, groups, self.recipe, self.trajectory[index])

    def to(self, device: torch.device | str) -> Calls:
        """The same calls, of a model on another device: rows stay where they are until a call takes them."""
        groups = [replace(group, device=torch.device(device)) for group in self.groups]
        return Calls(self.axis, groups, self.recipe, self.trajectory)

    @property
    def sha256(self) -> str:
        """Hash of every tensor (name, type, shape, bytes), of the trees and of the recipe."""
        return file.digest(*self._packed())

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, atomically; equal sets give equal bytes.

        Raises :class:`~ptq_tdq.errors.OutputError` when ``path`` cannot be written, :class:`CalibrationSetError` for
        an argument that a file cannot hold.
        """
        write_atomic(path, file.encode(*self._packed()))

    @classmethod
    def load(cls, path: str | Path) -> Calls:
        """Read and verify a file of :meth:`save`.

        Raises :class:`CalibrationSetError` for a missing, truncated, foreign or altered file.
        """
        header, tensors = file.read(path)
        try:
            groups = [file.unpack(packed, tensors) for packed in header["groups"]]
            loaded = cls(TimeAxis.from_dict(header["axis"]), groups, dict(header["recipe"]), tensors["trajectory"])
            lengths = {len(leaf) for group in groups for leaf in group.rows if len(leaf) != len(group)}
            # their number comes first: what groups name again and again takes no more than the trajectories account for
            if lengths or loaded.trajectory.shape != (len(loaded),) or loaded.t.shape != (len(loaded),):
                raise ValueError
        except (*_ALTERED, TimestepError) as error:
            raise CalibrationSetError(file.FOREIGN.format(path)) from error
        return loaded

    def check(self) -> None:
        """Raise :class:`CalibrationSetError` for an empty set and for NaN or Inf, naming the argument and t."""
        if not len(self):
            raise CalibrationSetError("The calibration set is empty: no call of the denoiser was recorded.")
        t = self.t
        for group, span in self.spans():
            for name, value in group.tree.items():
                for leaf in pytree.tree_leaves(value):
                    rows = group.rows[leaf.index] if isinstance(leaf, Place) else None
                    # -inf is what additive attention masks are made of
                    if isinstance(rows, Tensor) and rows.is_floating_point() and "mask" not in name:
                        finite = torch.isfinite(rows).reshape(len(rows), -1).all(1).cpu()
                        if not bool(finite.all()):
                            raise CalibrationSetError(
                                f"The calibration set has NaN or Inf in '{name}' at time step "
                                f"t = {t[span][~finite][0].item():g}; record it again with a healthy model."
                            )

    def _packed(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        tensors = {"trajectory": self.trajectory}
        groups = [file.pack(i, group, tensors) for i, group in enumerate(self.groups)]
        # through JSON, so that what is hashed is what a file gives back
        header = json.loads(json.dumps({"axis": self.axis.to_dict(), "recipe": self.recipe, "groups": groups}))
        return header, {name: value.cpu().contiguous() for name, value in tensors.items()}
