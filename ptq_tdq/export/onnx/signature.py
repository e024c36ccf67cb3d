"""What a graph is called with: the leaves of one recorded call, by name, and the tree that they belong to.

The names of the graph's inputs are those of the model's arguments; what is nested has dots in between
(``added_cond_kwargs.text_embeds``). A plain value (a flag, None) is not an input: it is part of the graph. So is a
tensor whose values the model's code reads (the mask of a prompt).
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ptq_tdq.calls import Calls, Each, Group, Place, fresh, main_argument
from ptq_tdq.calls.arguments import REFUSALS
from ptq_tdq.errors import ModelError
from ptq_tdq.timed_model import TimedModel, in_float32

Kind = Literal["rows", "each", "shared"]
RETURN_DICT = "return_dict"
CHECK = "as_recorded"  # bool [1]: whether the code's decisions are those that the graph was traced with
_PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class Leaf:
    """A tensor's place in the tree of a call.

    ``kind`` is "rows" (of samples, along ``dim``, with ``several`` of each sample or one), "each" (the place of a list
    with one tensor per sample) or "shared". A ``complex`` tensor [...] is an input [..., 2]. A tensor that is part of
    the graph is ``held``: these are hashes of its values, one for each sample of the graph.
    """

    name: str
    kind: Kind
    dim: int = 0
    several: bool = False
    complex: bool = False
    held: tuple[str, ...] = ()

    def real(self, value: Tensor) -> Tensor:
        """What the graph is given for an argument."""
        return torch.view_as_real(value.to(torch.complex64)) if self.complex else value

    def of_samples(self, value: Any, count: int) -> Any:
        """A value with rows for each of ``count`` samples; raises :class:`ModelError` for one of other samples."""
        if self.kind != "rows":
            return value
        rows = value.shape[self.dim]
        if rows == 1 < count:
            value = np.repeat(value, count, self.dim)
        elif rows % count or (rows != count and not self.several):
            raise ModelError(f"The graph was given {self.name} for {rows} samples, and {count} samples; give as many.")
        return value

    def some(self, value: Any, samples: Sequence[int], count: int) -> NDArray[Any]:
        """The part of some of ``count`` samples; of a list, of the one sample."""
        if self.kind == "each":
            array: NDArray[Any] = value[samples[0]]
        elif self.kind == "shared":
            array = value
        else:
            parts = np.split(value, count, self.dim)
            array = np.concatenate([parts[i] for i in samples], self.dim)
        return array

    def joined(self, parts: list[NDArray[Any]]) -> NDArray[Any]:
        """The result for all samples, from that for each; raises :class:`ModelError` where there is none."""
        if self.kind != "shared":
            return np.concatenate(parts, self.dim)
        if any(not np.array_equal(part, parts[0]) for part in parts):
            raise ModelError(
                f"The graph gives one {self.name} for all samples of a call, and these cannot be in one; call it with "
                "each alone."
            )
        return parts[0]

    def hashes(self, value: Any, count: int) -> tuple[str, ...]:
        """A hash of the values of each of ``count`` samples, whatever their precision."""
        found = []
        for i in range(count):
            array = self.some(value, [i], count)
            wide = array.astype(np.float32 if array.dtype.kind == "f" else np.int64)
            found.append(hashlib.sha256(str(wide.shape).encode() + wide.tobytes()).hexdigest())
        return tuple(found)


@dataclass(frozen=True)
class Signature:
    """How the model is called, and what it returns.

    ``arguments`` is the tree of its arguments by name, ``parameters`` are those of its ``forward`` (name, kind and, if
    there is one, the default), ``main`` is the argument that is denoised, ``time`` the one that holds the time step.
    ``outputs`` is the tree of what it returns (a tuple, if it takes ``return_dict``), ``fields`` are the names of the
    tuple's items in the object that it returns otherwise. A graph that is ``checked`` has one output more,
    :data:`CHECK`.
    """

    arguments: dict[str, Any]
    parameters: tuple[dict[str, Any], ...]
    main: str
    time: str
    outputs: Any
    fields: tuple[str, ...]
    checked: bool = False

    def tensors(self) -> list[Leaf]:
        """The tensors of a call, in order."""
        return [leaf for leaf in pytree.tree_leaves(self.arguments) if isinstance(leaf, Leaf)]

    def leaves(self) -> list[Leaf]:
        """The graph's inputs, in order."""
        return [leaf for leaf in self.tensors() if not leaf.held]

    def held(self) -> list[Leaf]:
        """The tensors that are part of the graph."""
        return [leaf for leaf in self.tensors() if leaf.held]

    @property
    def samples(self) -> int:
        """How many samples a graph is of whose batch is fixed: one, or one for each value that it holds."""
        return max((len(leaf.held) for leaf in self.held()), default=1)

    def holding(self, tensors: dict[str, Tensor], samples: int) -> Signature:
        """The signature of a graph that holds ``tensors`` of some ``samples``."""

        def hold(leaf: Any) -> Any:
            if not isinstance(leaf, Leaf) or leaf.name not in tensors:
                return leaf
            value = tensors[leaf.name].numpy()
            return replace(leaf, held=leaf.hashes([value] if leaf.kind == "each" else value, samples))

        return replace(self, arguments=pytree.tree_map(hold, self.arguments))

    def results(self) -> list[Leaf]:
        """The tensors that the model returns, in order."""
        return [leaf for leaf in pytree.tree_leaves(self.outputs) if isinstance(leaf, Leaf)]

    def output_names(self) -> list[str]:
        """The graph's outputs, in order."""
        names = [leaf.name for leaf in self.results()]
        return [*names, CHECK] if self.checked else names

    def fill(self, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """Keyword arguments of the model from a call's tensors; a list has the one tensor of a single sample."""

        def one(leaf: Any) -> Any:
            if not isinstance(leaf, Leaf):
                return leaf
            tensor = tensors[leaf.name]
            tensor = torch.view_as_complex(tensor) if leaf.complex else tensor
            return [tensor] if leaf.kind == "each" else tensor

        filled: dict[str, Any] = pytree.tree_map(one, self.arguments)
        return filled | self.as_tuple()

    def as_tuple(self) -> dict[str, Any]:
        """The argument that asks for a tuple, where the model has one."""
        return {RETURN_DICT: False} if any(p["name"] == RETURN_DICT for p in self.parameters) else {}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {
            "arguments": _pack(self.arguments),
            "parameters": list(self.parameters),
            "main": self.main,
            "time": self.time,
            "outputs": _pack(self.outputs),
            "fields": list(self.fields),
            "checked": self.checked,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Signature:
        """Inverse of :meth:`to_dict`; raises TypeError, ValueError or KeyError for other data."""
        return cls(
            _unpack(data["arguments"]),
            tuple(data["parameters"]),
            data["main"],
            data["time"],
            _unpack(data["outputs"]),
            tuple(data["fields"]),
            data["checked"],
        )


Rows = Callable[[Sequence[int]], dict[str, Tensor]]
"""Numbers of recorded rows -> the tensors of a call with them."""


def describe(model: TimedModel, calls: Calls) -> tuple[Signature, Rows, int]:
    """The signature of ``model`` as ``calls`` use it, a function that gives a call with some rows, and their number.

    ``model`` is run a few times, to see what it returns. The time is a float where the model takes it as one, so that
    schedulers with fractional steps work. Raises :class:`ModelError` for arguments or results that no graph has.
    """
    if not isinstance(calls, Calls) or not len(calls):
        raise ModelError("There is no recorded call to export the model with; record at least one.")
    group, time = max(calls.groups, key=len), calls.axis.argument
    tree = {name: value for name, value in group.tree.items() if name != RETURN_DICT}
    arguments = {name: _named(value, name, group) for name, value in tree.items()}
    tensors = dict(_tensors(arguments, tree, group))
    one, two = (in_float32(group.arguments(torch.zeros(count, dtype=torch.long))) for count in (1, 2))
    parameters = tuple(_parameter(p) for p in inspect.signature(model.model.forward).parameters.values())
    outputs, fields = _outputs(model, one, two, any(p["name"] == RETURN_DICT for p in parameters))
    if not tensors[time].is_floating_point() and _takes_float(model, one, time):
        tensors[time] = tensors[time].float()

    signature = Signature(arguments, parameters, main_argument(one, time), time, outputs, fields)

    def rows(numbers: Sequence[int]) -> dict[str, Tensor]:
        found = {}
        for leaf in signature.tensors():
            value = tensors[leaf.name]
            if leaf.kind == "rows":
                value = Place(0, leaf.dim, leaf.several).leaf(value[torch.tensor(numbers) % len(value)])
            found[leaf.name] = value
        return found

    return signature, rows, len(group)


def _named(value: Any, name: str, group: Group) -> Any:
    """A tree of leaves in the place of a tree of rows and tensors."""
    if isinstance(value, dict):
        return {key: _named(item, f"{name}.{key}", group) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [_named(item, f"{name}.{i}", group) for i, item in enumerate(value)]
        return value._make(items) if hasattr(value, "_make") else type(value)(items)  # a tuple whose items have names
    if isinstance(value, Place):
        rows = group.rows[value.index]
        if isinstance(rows, Each):
            return Leaf(name, "each", complex=rows.items[0].is_complex())
        return Leaf(name, "rows", value.dim, value.several, rows.is_complex())
    if isinstance(value, Tensor):
        return Leaf(name, "shared", complex=value.is_complex())
    if not isinstance(value, _PLAIN):
        raise ModelError(f"The model is called with {name} of type {type(value).__name__}, which no graph can have.")
    return value


def _tensors(arguments: Any, tree: Any, group: Group) -> Iterator[tuple[str, Tensor]]:
    """The recorded tensors by their leaves' names; of a list with a tensor per sample, that of the first one."""
    leaves, spec = pytree.tree_flatten(arguments)
    for leaf, value in zip(leaves, spec.flatten_up_to(tree), strict=True):
        if isinstance(leaf, Leaf):
            recorded = group.rows[value.index] if isinstance(value, Place) else value
            tensor = recorded.items[0] if isinstance(recorded, Each) else recorded
            assert isinstance(tensor, Tensor)
            tensor = leaf.real(tensor)
            yield leaf.name, tensor.float() if tensor.is_floating_point() else tensor


def _parameter(parameter: inspect.Parameter) -> dict[str, Any]:
    found: dict[str, Any] = {"name": parameter.name, "kind": parameter.kind.name}
    if parameter.default is not parameter.empty:
        found["default"] = parameter.default if isinstance(parameter.default, _PLAIN) else None
    return found


@torch.no_grad()
def _outputs(
    model: nn.Module, one: dict[str, Any], two: dict[str, Any], return_dict: bool
) -> tuple[Any, tuple[str, ...]]:
    """The tree of what ``model`` returns for one sample and for two, and the names of the fields of its object."""
    fields: tuple[str, ...] = ()
    as_tuple = {RETURN_DICT: False} if return_dict else {}
    if return_dict:
        whole = model(**fresh(one) | {RETURN_DICT: True})
        plain = isinstance(whole, Tensor | list | tuple)
        fields = getattr(whole, "_fields", ()) if plain else tuple(getattr(whole, "keys", lambda: vars(whole))())
    returned = model(**fresh(one) | as_tuple)
    fields = fields or getattr(returned, "_fields", ())
    leaves, spec = pytree.tree_flatten(returned)
    tensors = sum(isinstance(leaf, Tensor) for leaf in leaves)
    if not tensors:
        raise ModelError(
            f"The model returns an object of type {type(returned).__name__}, which no graph can give; let it return a "
            "tensor, or a tuple, list or dict of tensors."
        )
    names = iter(fields if len(fields) == tensors else map(str, range(tensors)))
    try:
        of_two, other = pytree.tree_flatten(model(**two | as_tuple))
    except REFUSALS:  # a model of one sample
        other = None
    pairs = zip(leaves, of_two if other == spec else leaves, strict=True)
    found = [_result(f"out_{next(names)}", *pair) if isinstance(pair[0], Tensor) else pair[0] for pair in pairs]
    return pytree.tree_unflatten(found, spec), fields


def _result(name: str, one: Tensor, two: Tensor) -> Leaf:
    """A tensor that is ``one`` for a sample and ``two`` for two: its rows are where it is longer, if it is there."""
    if one.is_complex():
        raise ModelError("The model returns complex numbers, which no graph gives; let it return torch.view_as_real.")
    if one.ndim != two.ndim or (one is two and one.ndim):  # a lone sample without an axis, or no other number of them
        return Leaf(name, "rows")
    longer = [axis for axis, sizes in enumerate(zip(one.shape, two.shape, strict=True)) if sizes[0] != sizes[1]]
    return Leaf(name, "rows", longer[0]) if longer else Leaf(name, "shared")


@torch.no_grad()
def _takes_float(model: nn.Module, arguments: dict[str, Any], time: str) -> bool:
    """Whether the model returns the same for a time step of floating point."""
    expected = pytree.tree_leaves(model(**fresh(arguments)))
    try:
        found = pytree.tree_leaves(model(**fresh({**arguments, time: arguments[time].float()})))
    except (RuntimeError, TypeError, ValueError, IndexError):
        return False
    return all(torch.equal(x, y) for x, y in zip(expected, found, strict=True) if isinstance(x, Tensor))


def _pack(value: Any) -> Any:
    if isinstance(value, Leaf):
        return {"input": [*vars(value).values()]}
    if isinstance(value, dict):
        return {"dict": {key: _pack(item) for key, item in value.items()}}
    if isinstance(value, list | tuple):
        return {"list" if isinstance(value, list) else "tuple": [_pack(item) for item in value]}
    return {"value": value}


def _unpack(packed: dict[str, Any]) -> Any:
    ((kind, content),) = packed.items()
    if kind == "input":
        name, place, dim, several, is_complex, held = content
        return Leaf(name, place, dim, several, is_complex, tuple(held))
    if kind == "dict":
        return {key: _unpack(item) for key, item in content.items()}
    if kind in ("list", "tuple"):
        items = [_unpack(item) for item in content]
        return items if kind == "list" else tuple(items)
    return content
