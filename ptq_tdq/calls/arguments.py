"""The arguments of a call as a tree, whose leaves are told apart by looking.

A leaf has one row per sample (latents, text embeddings, masks) or is shared by all samples (position ids, flags). So
prompts, guidance, pooled embeddings and whatever else a pipeline hands to its denoiser come along without being named.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ptq_tdq.errors import CalibrationSetError
from ptq_tdq.timeaxis import time_argument

Rows = slice | Tensor
SAME = 0.05  # relative difference of one row computed alone and among others; precision allows it
MOST_SHARED = 3  # leaves that happen to be as long as there are samples
# What a denoiser raises when it is called with arguments that do not belong together.
REFUSALS = (RuntimeError, ValueError, TypeError, IndexError, AttributeError, AssertionError)


@dataclass(frozen=True)
class Each:
    """A list argument with one tensor per sample, whose shapes may differ (ZImage's latents and captions)."""

    items: tuple[Tensor, ...]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, rows: Rows) -> Each:
        if isinstance(rows, slice):
            return Each(self.items[rows])
        return Each(tuple(self.items[i] for i in rows.tolist()))


@dataclass(frozen=True)
class Place:
    """Where a leaf with rows stands in a tree."""

    index: int


@dataclass
class Group:
    """Calls that differ in nothing but their rows: the tree of their arguments, and each row leaf [n, ...] by place."""

    tree: Any  # arguments with a Place for each leaf that has rows; other leaves as they are
    rows: list[Tensor | Each]

    def __len__(self) -> int:
        return len(self.rows[0])

    def arguments(self, index: Rows) -> dict[str, Any]:
        """Keyword arguments of one call with some of the rows."""

        def fill(leaf: Any) -> Any:
            if not isinstance(leaf, Place):
                return leaf
            part = self.rows[leaf.index][index]
            return list(part.items) if isinstance(part, Each) else part

        filled: dict[str, Any] = pytree.tree_map(fill, self.tree)
        return filled

    def take(self, index: Rows) -> Group:
        """Some of the rows as a group of their own."""
        return Group(self.tree, [leaf[index] for leaf in self.rows])

    def leaf(self, name: str) -> Tensor:
        """The rows of an argument that is one tensor."""
        found = self.rows[self.tree[name].index]
        assert isinstance(found, Tensor)
        return found

    def joinable(self, other: Group) -> bool:
        """Whether calls of both groups could have been one call with more rows."""
        mine, spec = pytree.tree_flatten(self.tree)
        others, other_spec = pytree.tree_flatten(other.tree)
        return (
            spec == other_spec
            and all(map(_same, mine, others))
            and all(_form(x) == _form(y) for x, y in zip(self.rows, other.rows, strict=True))
        )


def join(groups: Sequence[Group]) -> Group:
    """Joinable groups as one."""
    return Group(groups[0].tree, [_cat(leaves) for leaves in zip(*(group.rows for group in groups), strict=True)])


def bind(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call of ``model`` by name; what a ``**kwargs`` parameter takes stands beside the others."""
    signature = inspect.signature(model.forward)
    bound = dict(signature.bind(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            bound |= bound.pop(name, {})
    return bound


def main_argument_name(model: nn.Module) -> str:
    """The parameter of ``model.forward`` that takes what is denoised: the first one beside the time."""
    time = time_argument(model)
    return next(name for name in inspect.signature(model.forward).parameters if name != time)


def main_argument(arguments: dict[str, Any], time: str) -> str:
    """The argument that is denoised: the first one, beside the time, that holds tensors."""
    for name, value in arguments.items():
        if name != time and any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value)):
            return name
    raise CalibrationSetError("A recorded call has no tensor beside its time step; record calls of the denoiser.")


def count_rows(arguments: dict[str, Any], time: str) -> int:
    """Samples in one call: the first dimension of what is denoised, or the length of a list of them."""
    return len(arguments[main_argument(arguments, time)])


def split_rows(arguments: dict[str, Any], time: str, shared: frozenset[int] = frozenset()) -> Group:
    """Tell the leaves that have one row per sample from those that all samples share.

    A leaf whose first dimension is the number of samples has rows, but for those numbered in ``shared``.
    """
    count, number = count_rows(arguments, time), iter(range(1 << 30))
    lists = isinstance(arguments[main_argument(arguments, time)], list)
    rows: list[Tensor | Each] = []

    def place(value: Tensor | Each) -> Place:
        rows.append(value)
        return Place(len(rows) - 1)

    def walk(value: Any, name: str = "") -> Any:
        if isinstance(value, dict):
            return {key: walk(item, key) for key, item in value.items()}
        if lists and isinstance(value, list) and len(value) == count and all(isinstance(x, Tensor) for x in value):
            return place(Each(tuple(x.detach() for x in value)))
        if isinstance(value, list | tuple):
            return type(value)(walk(item) for item in value)
        if name == time:
            return place(_time_rows(value, count))
        if isinstance(value, Tensor) and value.ndim and len(value) == count and next(number) not in shared:
            return place(value.detach())
        return value.detach() if isinstance(value, Tensor) else value

    return Group({name: walk(value, name) for name, value in arguments.items()}, rows)


def find_shared(model: nn.Module, arguments: dict[str, Any], time: str) -> frozenset[int]:
    """Which leaves only happen to be as long as there are samples, as position ids or layer scales may be.

    Found by calling the model with other rows: with the right split, row 0 comes out as it does in the whole call.
    """
    candidates = len(split_rows(arguments, time).rows) - 2  # beside x, which is the first, and the time
    index = torch.tensor([0] if count_rows(arguments, time) > 1 else [0, 0])
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        expected = prediction(model(**arguments))[:1]
        works: list[frozenset[int]] = []
        for shared in _subsets(max(0, candidates)):
            try:
                found = prediction(model(**split_rows(arguments, time, shared).arguments(index)))[:1]
            except REFUSALS:
                continue
            works.append(shared)
            error = (found - expected).float().norm() / expected.float().norm().clamp(min=1e-12)
            if found.shape == expected.shape and float(error) < SAME:
                return shared
    return works[0] if works else frozenset()


def _subsets(count: int) -> Iterator[frozenset[int]]:
    """Subsets of 1..count, small ones first; leaf 0 is x."""
    for size in range(min(count, MOST_SHARED) + 1):
        yield from map(frozenset, combinations(range(1, count + 1), size))


def _time_rows(value: Any, count: int) -> Tensor:
    """The time argument with one row per sample, in its own dtype."""
    t = torch.as_tensor(value).detach()
    return t.reshape(1).expand(count) if t.numel() == 1 else t


def _form(leaf: Tensor | Each) -> tuple[Any, ...]:
    return ("each",) if isinstance(leaf, Each) else (leaf.dtype, leaf.shape[1:])


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and bool(a == b)


def _cat(leaves: Sequence[Tensor | Each]) -> Tensor | Each:
    if len(leaves) == 1:
        return leaves[0]
    if isinstance(leaves[0], Each):
        return Each(tuple(item for leaf in leaves if isinstance(leaf, Each) for item in leaf.items))
    return torch.cat([leaf for leaf in leaves if isinstance(leaf, Tensor)])


def tensors_of(output: Any) -> list[Tensor]:
    """All tensors of a denoiser's output (a tensor, tuple, dict or diffusers output), the prediction first."""
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def prediction(output: Any) -> Tensor:
    """What a denoiser predicts: the first tensor of its output, or its list with one tensor per row, stacked."""
    first = output
    while not isinstance(first, Tensor):
        if isinstance(first, list) and all(isinstance(x, Tensor) for x in first):
            return torch.stack(first)
        values: Sequence[Any] = list(first.values()) if isinstance(first, dict) else first
        first = values[0]
    return first
