"""The arguments of a call as a tree, whose leaves are told apart by looking.

A leaf has one row per sample (latents, text embeddings, masks) or is shared by all samples (position ids, flags). So
prompts, guidance, pooled embeddings and whatever else a pipeline hands to its denoiser come along without being named.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from inspect import Parameter
from itertools import combinations, takewhile
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ptq_tdq.calls.borrowed import borrowed
from ptq_tdq.calls.gradients import without_gradients
from ptq_tdq.calls.outputs import last_row
from ptq_tdq.errors import CalibrationSetError, ModelError, TimestepError
from ptq_tdq.timeaxis import signature_of, time_argument

Rows = slice | Tensor
SAME = 0.05  # relative difference of one row computed alone and among others; precision allows it
PLAIN = (bool, int, float, str, type(None), torch.Size)  # arguments beside tensors
MOST_ODD = 3  # leaves whose length does not tell what they are
# What a denoiser raises when it is called with arguments that do not belong together.
REFUSALS = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError)


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
    """Where a leaf with rows stands in a tree.

    In a call its rows lie along ``dim``; with ``several`` of each sample, [n, k, ...] becomes [n * k, ...].
    """

    index: int
    dim: int = 0
    several: bool = False

    def leaf(self, rows: Tensor) -> Tensor:
        """What a call gets, from some rows [n, ...]."""
        return (rows.flatten(0, 1) if self.several else rows).movedim(0, self.dim)

    def rows(self, leaf: Tensor, count: int) -> Tensor:
        """Inverse of :meth:`leaf`."""
        rows = leaf.detach().movedim(self.dim, 0)
        return rows.unflatten(0, (count, -1)) if self.several else rows


@dataclass
class Group:
    """Calls that differ in nothing but their rows: the tree of their arguments, and each row leaf [n, ...] by place."""

    tree: Any  # arguments with a Place for each leaf that has rows; other leaves as they are
    rows: list[Tensor | Each]
    device: torch.device | None = None  # of the arguments, where that is not the device of the rows

    def __len__(self) -> int:
        return len(self.rows[0])

    def arguments(self, index: Rows) -> dict[str, Any]:
        """Keyword arguments of one call with some of the rows, which the call may write into."""

        def given(x: Tensor) -> Tensor:
            return x.to(self.device or x.device, copy=True)

        def fill(leaf: Any) -> Any:
            if not isinstance(leaf, Place):
                return given(leaf) if isinstance(leaf, Tensor) else leaf
            part = self.rows[leaf.index][index]
            return [*map(given, part.items)] if isinstance(part, Each) else given(leaf.leaf(part))

        filled: dict[str, Any] = pytree.tree_map(fill, self.tree)
        return filled

    def take(self, index: Rows) -> Group:
        """Some of the rows as a group of their own."""
        return Group(self.tree, [leaf[index] for leaf in self.rows], self.device)

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
            and all(map(same, mine, others))
            and all(_form(x) == _form(y) for x, y in zip(self.rows, other.rows, strict=True))
        )


def places_of(group: Group) -> set[Any]:
    """Where, in the tree of a call, what has its samples in the first dimension stands."""
    return {
        path
        for path, leaf in pytree.tree_leaves_with_path(group.tree)
        if isinstance(leaf, Place) and leaf.dim == 0 and not leaf.several
    }


def fresh(arguments: dict[str, Any]) -> dict[str, Any]:
    """Copies of arguments, for a call before others with the same: a model may compute in them, or take items out."""
    copies: dict[str, Any] = pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, arguments)
    return copies


def given_rows(group: Group, places: Set[Any]) -> Group:
    """The group with a row for each sample where those of ``places`` share a single one (a pipeline's one negative
    prompt for several prompts).
    """
    rows: list[Tensor | Each] = []

    def place(path: Any, leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.shape[:1] == (1,) and path in places:
            rows.append(leaf.expand(len(group), *leaf.shape[1:]))
            return Place(len(rows) - 1)
        if isinstance(leaf, Place):
            rows.append(group.rows[leaf.index])
            return replace(leaf, index=len(rows) - 1)
        return leaf

    return Group(pytree.tree_map_with_path(place, group.tree), rows, group.device)


def join(groups: Sequence[Group]) -> Group:
    """Joinable groups as one."""
    rows = [_cat(leaves) for leaves in zip(*(group.rows for group in groups), strict=True)]
    return Group(groups[0].tree, rows, groups[0].device)


def bind(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call of ``model`` by name; what a ``**kwargs`` parameter takes stands beside the others.

    Raises :class:`ModelError` for a call that gives an ``*args`` parameter something, which has no name.
    """
    signature = signature_of(model)
    bound = dict(signature.bind(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            bound |= bound.pop(name, {})
        elif parameter.kind is parameter.VAR_POSITIONAL and bound.pop(name, ()):
            raise ModelError(
                f"{type(model).__name__} was called with arguments for *{name}, which have no names to call it again "
                "by; let its forward name them."
            )
    return bound


def hear_positions(model: nn.Module) -> None:
    """Give the arguments of calls by name by position to those hooks of ``model`` that hear of these alone."""
    for hooks, with_names, heard in _hooks_of(model):
        for key in hooks.keys() - with_names.keys():
            hooks[key], with_names[key] = partial(heard, hooks[key]), True


@contextmanager
def hearing_positions(model: nn.Module) -> Iterator[None]:
    """While open, as :func:`hear_positions`."""
    before = [(kept, dict(kept)) for *both, _ in _hooks_of(model) for kept in both]
    hear_positions(model)
    try:
        yield
    finally:
        for kept, own in before:
            kept.clear()
            kept.update(own)


def _hooks_of(model: nn.Module) -> list[tuple[dict[int, Any], dict[int, bool], Callable[..., Any]]]:
    return [
        (model._forward_pre_hooks, model._forward_pre_hooks_with_kwargs, _before),
        (model._forward_hooks, model._forward_hooks_with_kwargs, _behind),
    ]


def _before(hook: Callable[..., Any], model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    names = _leading(model, args, kwargs)
    found = hook(model, (*args, *(kwargs[name] for name in names)))
    if found is None:
        return None
    given = found if isinstance(found, tuple) else (found,)
    others = {k: v for k, v in kwargs.items() if k not in names}
    if len(given) != len(args) + len(names):
        return given, others
    return given[: len(args)], others | dict(zip(names, given[len(args) :], strict=True))


def _behind(hook: Callable[..., Any], model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    return hook(model, (*args, *(kwargs[name] for name in _leading(model, args, kwargs))), output)


def _leading(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    """The arguments by name that follow those by position, without a gap."""
    parameters = signature_of(model).parameters.values()
    names = [p.name for p in parameters if p.kind is Parameter.POSITIONAL_OR_KEYWORD][len(args) :]
    return [*takewhile(kwargs.__contains__, names)]


def check_argument(value: Any) -> None:
    """Raise :class:`CalibrationSetError` for what is neither a tensor nor plain, nor a tree of these."""
    parts = pytree.tree_leaves(value, is_leaf=lambda x: x is not value)
    if isinstance(value, dict | list | tuple) and not any(part is value for part in parts):
        for part in parts:
            check_argument(part)
        return
    dense = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_nested
    if not dense and not isinstance(value, PLAIN):  # also a dict of a class of one's own, whose items no tree knows
        kind = type(value).__name__ if type(value).__module__ != "numpy" else f"numpy.{type(value).__name__}"
        if isinstance(value, Tensor):
            kind = "sparse or nested tensor"
        raise CalibrationSetError(
            f"A call has an argument of type {kind}, which a calibration set cannot hold; call the denoiser with dense "
            "tensors and plain values, alone or in plain dicts, lists and tuples."
        )


def main_argument_name(model: nn.Module, time: str | None = None) -> str:
    """The parameter of ``model.forward`` that takes what is denoised: the first one beside the ``time``."""
    time = time_argument(model, time)
    return next(name for name in signature_of(model).parameters if name != time)


def main_argument(arguments: dict[str, Any], time: str) -> str:
    """The argument that is denoised: the first one, beside the time, that holds tensors with rows."""
    for name, value in arguments.items():
        if name != time and any(map(_has_rows, pytree.tree_leaves(value))):
            return name
    raise CalibrationSetError("A recorded call has no tensor beside its time step; record calls of the denoiser.")


def _has_rows(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim > 0


def count_rows(arguments: dict[str, Any], time: str) -> int:
    """Samples in one call: the first dimension of what is denoised, or the length of a list of them."""
    main = arguments[main_argument(arguments, time)]
    return len(main) if isinstance(main, list) else len(next(filter(_has_rows, pytree.tree_leaves(main))))


Odd = frozenset[tuple[int, int, bool]]
"""Leaves, by number, that are not what their length says: with rows along a dimension, several of each sample or one;
along dimension -1 with none at all."""


def split_rows(arguments: dict[str, Any], time: str, odd: Odd = frozenset()) -> Group:
    """Tell the leaves that have rows of samples from those that all samples share.

    A leaf whose first dimension is the number of samples has one row of each, any other is shared, but for those in
    ``odd``: position ids that happen to be as long, or one text for each frame of a video.
    """
    count, forms = count_rows(arguments, time), {leaf: (dim, several) for leaf, dim, several in odd}
    leaves, spec = _flatten(arguments, time)
    rows: list[Tensor | Each] = []

    def place(number: int, name: str, value: Any) -> Any:
        if name == time:
            value = _time_rows(value, name, count)
        elif isinstance(value, list):
            value = Each(tuple(x.detach() for x in value))
        elif not isinstance(value, Tensor):
            return value
        own = isinstance(value, Each) or (value.ndim > 0 and len(value) == count)
        dim, several = forms.get(number, (0 if own else -1, False))
        if dim < 0:
            return value.detach()
        found = Place(len(rows), dim, several)
        rows.append(value if isinstance(value, Each) else found.rows(value, count))
        return found

    return Group(pytree.tree_unflatten([place(i, *leaf) for i, leaf in enumerate(leaves)], spec), rows)


def _flatten(arguments: dict[str, Any], time: str) -> tuple[list[tuple[str, Any]], Any]:
    """Each leaf with the name of its argument, and the tree; a list of one tensor for each sample is one leaf.

    Such lists there are where what is denoised is one.
    """
    main, count = arguments[main_argument(arguments, time)], count_rows(arguments, time)

    def each(value: Any) -> bool:
        lists = isinstance(value, list) and isinstance(main, list)
        return lists and len(value) == count and all(isinstance(x, Tensor) for x in value)

    leaves, spec = pytree.tree_flatten(arguments, is_leaf=each)
    names = [name for name, value in arguments.items() for _ in pytree.tree_leaves(value, is_leaf=each)]
    return list(zip(names, leaves, strict=True)), spec


def _odd_forms(leaf: Tensor, count: int) -> Iterator[tuple[int, bool]]:
    """What else a leaf may be; see :data:`Odd`."""
    if leaf.ndim > 1 and leaf.shape[1] == count:
        yield (1, False)
    if leaf.ndim and len(leaf) == count:
        yield (-1, False)
    elif leaf.ndim and len(leaf) and len(leaf) % count == 0:
        yield (0, True)


def find_odd(model: nn.Module, arguments: dict[str, Any], time: str) -> Odd:
    """Which leaves are not what their length says.

    Found by calling the model with the last row alone and with that row once more: with the right split it comes out as
    in the whole call. (The first row will not do: of a shared leaf whose first row is its own it says nothing.) The
    model is called where a leaf may be something else, and :func:`borrowed` for that; none is odd where it refuses.
    """
    count, given = count_rows(arguments, time), (time, main_argument(arguments, time))
    leaves = _flatten(arguments, time)[0]
    tensors = [(i, x) for i, (name, x) in enumerate(leaves) if name not in given]
    candidates = [(i, *form) for i, x in tensors if isinstance(x, Tensor) for form in _odd_forms(x, count)]
    works: list[Odd] = []
    if not candidates:
        return frozenset()
    with suppress(*REFUSALS), without_gradients(model), hearing_positions(model):
        expected = _last_row(model, arguments)
        for odd in _subsets(candidates, _alike(candidates, [x for _, x in leaves])):
            group = split_rows(arguments, time, odd)
            errors = [
                _error(model, group.arguments(torch.tensor(index)), expected)
                for index in ([count - 1], [*range(count), count - 1])
            ]
            if max(errors) < math.inf:
                works.append(odd)
            if max(errors) < SAME:
                return odd
    return works[0] if works else frozenset()


def _last_row(model: nn.Module, arguments: dict[str, Any]) -> Tensor:
    with borrowed(model):
        return last_row(model(**fresh(arguments)))


def _error(model: nn.Module, arguments: dict[str, Any], expected: Tensor) -> float:
    """Relative error of the last row; infinite where the model refuses the arguments."""
    try:
        found = _last_row(model, arguments)
        size = expected.float().norm().clamp(min=1e-12)
        return float((found - expected).float().norm() / size) if found.shape == expected.shape else math.inf
    except REFUSALS:
        return math.inf


def _subsets(candidates: Sequence[tuple[int, int, bool]], alike: Sequence[Odd] = ()) -> Iterator[Odd]:
    """Subsets of few forms, small ones first, none with two forms of one leaf; those that are alike count as one."""
    ones = [*(frozenset([form]) for form in candidates), *alike]
    for size in range(min(len(ones), MOST_ODD) + 1):
        for some in combinations(ones, size):
            odd = frozenset[tuple[int, int, bool]]().union(*some)
            if len({leaf for leaf, *_ in odd}) == sum(map(len, some)):
                yield odd


def _alike(candidates: Iterable[tuple[int, int, bool]], leaves: Sequence[Any]) -> list[Odd]:
    """More than :data:`MOST_ODD` leaves of one length, with several rows of each sample (what a ControlNet adds)."""
    found: dict[int, set[tuple[int, int, bool]]] = {}
    for leaf, dim, several in candidates:
        if several:
            found.setdefault(len(leaves[leaf]), set()).add((leaf, dim, several))
    return [frozenset(of) for of in found.values() if len(of) > MOST_ODD]


def _time_rows(value: Any, name: str, count: int) -> Tensor:
    """The time argument with one row per sample, in its own dtype."""
    t = torch.as_tensor(value).detach()
    if t.numel() > 1 and len(t) != count:
        raise TimestepError(
            f"The model was called with {len(t)} values of {name} for {count} samples; samples are the first dimension "
            "of what is denoised, and time steps are one, or one for each."
        )
    return torch.atleast_1d(t).expand(count, *t.shape[1:]) if t.numel() == 1 else t


def _form(leaf: Tensor | Each) -> tuple[Any, ...]:
    return ("each",) if isinstance(leaf, Each) else (leaf.dtype, leaf.shape[1:])


def same(a: Any, b: Any) -> bool:
    """Whether two leaves are equal; tensors in shape and dtype too."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    return a is b or (type(a) is type(b) and bool(a == b))


def _cat(leaves: Sequence[Tensor | Each]) -> Tensor | Each:
    if len(leaves) == 1:
        return leaves[0]
    if isinstance(leaves[0], Each):
        return Each(tuple(item for leaf in leaves if isinstance(leaf, Each) for item in leaf.items))
    return torch.cat([leaf for leaf in leaves if isinstance(leaf, Tensor)])
