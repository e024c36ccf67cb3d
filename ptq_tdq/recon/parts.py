"""Trees of tensors for all samples of a calibration set, some of them at hand at a time.

A unit of a model gets and gives trees whose leaves mostly have rows of samples. Samples whose trees differ in more than
their rows (prompts of other lengths, masks that only some need) cannot be in one tensor, nor in one call: each run of
alike ones is a part.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ptq_tdq.calls.arguments import same
from ptq_tdq.errors import ModelError, OutputError
from ptq_tdq.files import nearest, reason


class Place(NamedTuple):
    """Where a leaf has the rows of samples: along ``dim``, ``each`` rows for one, one sample after the other.

    ``more`` rows behind those belong to no sample.
    """

    dim: int
    each: int
    more: int = 0


ABSENT = Place(-1, 0)  # a leaf that is no tensor where all samples are alike; rows are then told by their number
Layout = tuple[Place | None, ...]
"""For each leaf of a tree where its rows are, or None for what all samples share."""


class Store:
    """Keeps streams on ``device`` or, with ``on_disk``, in memory-mapped files that the system pages out.

    The files have no name, so they are gone with the run, however it ends; they are on the disk of ``folder``, which
    need not be there.
    """

    def __init__(self, on_disk: bool, device: torch.device | str = "cpu", folder: Path | None = None) -> None:
        self.on_disk, self.device, self.folder = on_disk, torch.device(device), folder and nearest(folder)

    def join(self, chunks: Sequence[Tensor]) -> Tensor:
        """The rows of all chunks."""
        if not self.on_disk:
            return torch.cat(list(chunks)) if len(chunks) > 1 else chunks[0]
        whole = self.empty((sum(len(c) for c in chunks), *chunks[0].shape[1:]), chunks[0].dtype)
        start = 0
        for chunk in chunks:
            whole[start : start + len(chunk)] = chunk
            start += len(chunk)
        return whole

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor where this store keeps them; raises :class:`OutputError` where the disk is full."""
        if not self.on_disk:
            return torch.empty(shape, dtype=dtype, device=self.device)
        size = torch.Size(shape).numel()
        try:
            with tempfile.NamedTemporaryFile(prefix=".ptq-tdq-", suffix=".tmp", dir=self.folder) as file:
                if size and hasattr(os, "posix_fallocate"):  # else a full disk ends the process at the first write
                    os.posix_fallocate(file.fileno(), 0, size * dtype.itemsize)
                return torch.from_file(file.name, shared=True, size=size, dtype=dtype).view(shape)
        except OSError as error:
            folder, count = self.folder or tempfile.gettempdir(), size * dtype.itemsize
            raise OutputError(
                f"{count:,} bytes of the streams cannot be kept in {folder} ({reason(error)}); free some space "
                "or record fewer calls."
            ) from error


@dataclass(frozen=True, eq=False)
class Form:
    """What trees of ``samples`` have in common with those that they may be joined with: structure and shared leaves."""

    samples: slice
    structure: Any
    shared: list[Any]

    def same(self, other: Form) -> bool:
        return self.structure == other.structure and all(map(same, self.shared, other.shared))


def spans(forms: Sequence[Form]) -> tuple[slice, ...]:
    """The samples that may run together, from consecutive forms."""
    found: list[slice] = []
    for last, form in zip([None, *forms], forms, strict=False):
        alike = last is not None and last.same(form)
        found.append(slice(found.pop().start if alike else form.samples.start, form.samples.stop))
    return tuple(found)


@dataclass(frozen=True, eq=False)
class Part:
    """The trees of consecutive ``samples`` as one: a leaf with rows is [n, count, ...], others are as they came.

    ``rest`` are the rows of leaves that belong to no sample, by the number of the leaf.
    """

    samples: slice
    leaves: tuple[Any, ...]
    rest: dict[int, Tensor]
    spec: pytree.TreeSpec
    layout: Layout
    device: torch.device  # where the rows are computed with, wherever they are kept

    @classmethod
    def of(cls, tree: Any, samples: slice, layout: Layout) -> Part:
        """The tree of one call; ``layout`` is that of other samples of its group."""
        leaves, spec = pytree.tree_flatten(tree)
        count = samples.stop - samples.start
        known = (*layout, *(ABSENT,) * (len(leaves) - len(layout)))
        own = tuple(_own(leaf, place, count) for leaf, place in zip(leaves, known, strict=False))
        rest: dict[int, Tensor] = {}
        for i, place in enumerate(own):
            if place:
                rows = leaves[i].movedim(place.dim, 0)
                if place.more:
                    rows, rest[i] = rows.split([count * place.each, place.more])
                leaves[i] = rows.unflatten(0, (count, place.each))
        device = next((x.device for x, place in zip(leaves, own, strict=True) if place), torch.device("cpu"))
        return cls(samples, tuple(leaves), rest, spec, own, device)

    def form(self) -> Form:
        """All but the rows."""
        pairs = list(zip(self.leaves, self.layout, strict=True))
        rows = [(leaf.shape[1:], leaf.dtype) for leaf, place in pairs if place]
        shared = [*(leaf for leaf, place in pairs if not place), *self.rest.values()]
        return Form(
            self.samples,
            (str(self.spec), self.layout, rows),
            [leaf.cpu() if isinstance(leaf, Tensor) else leaf for leaf in shared],
        )

    @staticmethod
    def join(parts: Sequence[Part], store: Store) -> Part:
        """Parts of one form, one after the other."""
        first, samples = parts[0], slice(parts[0].samples.start, parts[-1].samples.stop)
        columns = zip(*(part.leaves for part in parts), strict=True)
        leaves = [store.join(of) if place else of[0] for of, place in zip(columns, first.layout, strict=True)]
        return replace(first, samples=samples, leaves=tuple(leaves))

    def __getitem__(self, index: slice | Tensor) -> Any:
        """The tree for some samples, by their numbers in the whole set."""
        found = [self._back(i, place, index) if place else self.leaves[i] for i, place in enumerate(self.layout)]
        return pytree.tree_unflatten(found, self.spec)

    def real(self, index: slice | Tensor) -> list[Tensor]:
        """The leaves with rows of real numbers, for some samples: [n * count, ...]."""
        own = self._own_index(index)
        return [
            leaf[own].to(self.device).flatten(0, 1)
            for leaf, place in zip(self.leaves, self.layout, strict=True)
            if place and leaf.is_floating_point()
        ]

    def empty(self, samples: slice, store: Store) -> Part:
        """Room for the trees of ``samples`` that are like this one."""
        count = samples.stop - samples.start
        leaves = [
            store.empty((count, *leaf.shape[1:]), leaf.dtype) if place else leaf
            for leaf, place in zip(self.leaves, self.layout, strict=True)
        ]
        return replace(self, samples=samples, leaves=tuple(leaves))

    def put(self, index: slice | Tensor, other: Part) -> None:
        """Write the rows of other samples' outputs."""
        own = self._own_index(index)
        for mine, new, place in zip(self.leaves, other.leaves, self.layout, strict=True):
            if place:
                mine[own] = new.to(mine.device)

    def _own_index(self, index: slice | Tensor) -> slice | Tensor:
        start = self.samples.start
        return slice(index.start - start, index.stop - start) if isinstance(index, slice) else index - start

    def _back(self, number: int, place: Place, index: slice | Tensor) -> Tensor:
        rows = self.leaves[number][self._own_index(index)].to(self.device).flatten(0, 1)
        if place.more:
            rows = torch.cat([rows, self.rest[number]])
        back: Tensor = rows.movedim(0, place.dim)
        return back


def _own(leaf: Any, place: Place | None, samples: int) -> Place | None:
    """The place of rows in this leaf, where ``place`` is that in the tree of other samples."""
    if place is None or not isinstance(leaf, Tensor):
        return None
    if place == ABSENT:
        return Place(0, len(leaf) // samples) if leaf.ndim and len(leaf) and len(leaf) % samples == 0 else None
    if leaf.shape[place.dim] != samples * place.each + place.more:
        raise ModelError(
            f"A block of the model gets a tensor of the shape {list(leaf.shape)} for {samples} samples, in which their "
            "rows cannot be told apart; record calls of one size (prompts padded to one length). Where values decide "
            "how many rows there are (of tokens sent to experts), name the class of the module around the block in the "
            "model's _no_split_modules, or skip the layers inside."
        )
    return place


@dataclass(frozen=True, eq=False)
class Parts:
    """Trees of all samples."""

    parts: tuple[Part, ...]

    def first(self) -> Tensor:
        """The number of one sample."""
        return torch.tensor([self.parts[0].samples.start])

    def of(self, index: slice | Tensor) -> Part:
        """The part that holds some samples, which all have to be in one."""
        first = index.start if isinstance(index, slice) else int(index[0])
        return next(part for part in self.parts if part.samples.start <= first < part.samples.stop)

    def __getitem__(self, index: slice | Tensor) -> Any:
        return self.of(index)[index]

    def real(self, index: slice | Tensor) -> list[Tensor]:
        return self.of(index).real(index)
