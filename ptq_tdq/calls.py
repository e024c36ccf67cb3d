"""Calls of a denoiser: one forward pass with all its arguments is one value, and a calibration set is many of them.

A call's arguments are a tree (dicts, lists, tuples). Its leaves are told apart by looking: what has one row per sample
(latents, text embeddings, masks) and what all samples share (position ids, flags). So prompts, guidance, pooled
embeddings and whatever else a pipeline hands to its denoiser come along without being named anywhere.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ptq_tdq.artifacts.atomic import write_atomic
from ptq_tdq.errors import CalibrationSetError
from ptq_tdq.timeaxis import TimeAxis, find_axis, time_argument, time_values

Rows = slice | Tensor
SAME = 0.05  # relative difference of one row computed alone and among others; precision allows it
_METADATA_KEY = "ptq_tdq_calls"  # one key: safetensors writes several in random order


@dataclass(frozen=True)
class Each:
    """A list argument with one tensor per sample, whose shapes may differ (ZImage's latents and captions)."""

    items: tuple[Tensor, ...]

    def __getitem__(self, rows: Rows) -> Each:
        if isinstance(rows, slice):
            return Each(self.items[rows])
        return Each(tuple(self.items[i] for i in rows.tolist()))


@dataclass
class Group:
    """Calls that differ in nothing but their rows: the tree of their arguments, and each row leaf [n, ...] by place."""

    tree: Any  # arguments with a Place for each leaf that has rows; other leaves as they are
    rows: list[Tensor | Each]

    def arguments(self, index: Rows) -> dict[str, Any]:
        """Keyword arguments of one call with some of the rows."""

        def fill(leaf: Any) -> Any:
            if not isinstance(leaf, Place):
                return leaf
            part = self.rows[leaf.index][index]
            return list(part.items) if isinstance(part, Each) else part

        filled: dict[str, Any] = pytree.tree_map(fill, self.tree)
        return filled


@dataclass(frozen=True)
class Place:
    """Where a leaf with rows stands in a tree."""

    index: int


def bind(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call of ``model`` by name; what a ``**kwargs`` parameter takes stands beside the others."""
    signature = inspect.signature(model.forward)
    bound = dict(signature.bind(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            bound |= bound.pop(name, {})
    return bound


def main_argument(arguments: dict[str, Any], time: str) -> str:
    """The argument that is denoised: the first one, beside the time, that holds tensors."""
    for name, value in arguments.items():
        if name != time and any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value)):
            return name
    raise CalibrationSetError("A recorded call has no tensor beside its time step; record calls of the denoiser.")


def count_rows(arguments: dict[str, Any], time: str) -> int:
    """Samples in one call: the first dimension of what is denoised, or the length of a list of them."""
    main = arguments[main_argument(arguments, time)]
    return len(main)


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
    group = split_rows(arguments, time)
    candidates = len(group.rows) - 2  # beside x, which is the first, and the time
    index = torch.tensor([0] if count_rows(arguments, time) > 1 else [0, 0])
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        expected = prediction(model(**arguments))[:1]
        works: list[frozenset[int]] = []
        for shared in _subsets(max(0, candidates)):
            try:
                part = split_rows(arguments, time, shared).arguments(index)
                found = prediction(model(**part))[:1]
            except (RuntimeError, ValueError, TypeError, IndexError, AttributeError):
                continue
            works.append(shared)
            error = (found - expected).float().norm() / expected.float().norm().clamp(min=1e-12)
            if found.shape == expected.shape and float(error) < SAME:
                return shared
    return works[0] if works else frozenset()


def _subsets(count: int) -> Iterator[frozenset[int]]:
    """Subsets of 1..count, small ones first; leaf 0 is x."""
    for size in range(min(count, 3) + 1):
        yield from map(frozenset, combinations(range(1, count + 1), size))


def _time_rows(value: Any, count: int) -> Tensor:
    """The time argument with one row per sample, in its own dtype."""
    t = torch.as_tensor(value).detach()
    return t.expand(count) if t.numel() == 1 else t


@dataclass
class Calls:
    """Recorded calls of a denoiser, as N rows: a calibration set.

    ``axis`` says how the model's time argument becomes the scheduler's time step t, ``recipe`` how the calls were made
    (plain JSON values). ``trajectory`` int64 [N] numbers the trajectories that the rows belong to.
    Filled by :func:`record`; read by :meth:`inputs`.
    """

    axis: TimeAxis
    groups: list[Group] = field(default_factory=list)
    recipe: dict[str, Any] = field(default_factory=dict)
    trajectory: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))

    def __len__(self) -> int:
        return sum(_length(group) for group in self.groups)

    def spans(self) -> Iterator[tuple[Group, slice]]:
        """Each group with the numbers of its rows."""
        start = 0
        for group in self.groups:
            yield group, slice(start, start + _length(group))
            start += _length(group)

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
                inner = (
                    slice(index.start - span.start, index.stop - span.start)
                    if isinstance(index, slice)
                    else index - span.start
                )
                return group.arguments(inner)
        raise IndexError(first)

    @property
    def t(self) -> Tensor:
        """The scheduler's time step of each row, float32 [N]."""
        found = [self.axis.t(_time_leaf(group, self.axis.argument)) for group in self.groups]
        return torch.cat(found) if found else torch.empty(0)

    def add(self, arguments: dict[str, Any], trajectory: Tensor, shared: frozenset[int] = frozenset()) -> None:
        """Take in one call of a denoiser, whose rows belong to ``trajectory`` [n]; see :func:`split_rows`."""
        self.extend(Calls(self.axis, [split_rows(arguments, self.axis.argument, shared)], trajectory=trajectory))

    def extend(self, other: Calls) -> None:
        """Append the rows of ``other``, group by group."""
        at = [span for _, span in self.spans()]
        trajectories = [self.trajectory[span] for span in at]
        for group, span in other.spans():
            found = next((i for i, mine in enumerate(self.groups) if _joinable(mine, group)), None)
            if found is None:
                self.groups.append(group)
                trajectories.append(other.trajectory[span])
            else:
                mine = self.groups[found]
                mine.rows = [_cat(a, b) for a, b in zip(mine.rows, group.rows, strict=True)]
                trajectories[found] = torch.cat([trajectories[found], other.trajectory[span]])
        self.trajectory = torch.cat(trajectories) if trajectories else self.trajectory

    def select(self, index: Tensor) -> Calls:
        """The rows ``index`` (ascending) as calls of their own."""
        groups = []
        for group, span in self.spans():
            inner = index[(index >= span.start) & (index < span.stop)] - span.start
            if len(inner):
                groups.append(Group(group.tree, [leaf[inner] for leaf in group.rows]))
        return Calls(self.axis, groups, self.recipe, self.trajectory[index])

    def to(self, device: torch.device | str) -> Calls:
        """The same calls on another device."""

        def move(leaf: Any) -> Any:
            if isinstance(leaf, Each):
                return Each(tuple(x.to(device) for x in leaf.items))
            return leaf.to(device) if isinstance(leaf, Tensor) else leaf

        groups = [Group(pytree.tree_map(move, g.tree), [move(leaf) for leaf in g.rows]) for g in self.groups]
        return Calls(self.axis, groups, self.recipe, self.trajectory)

    @property
    def sha256(self) -> str:
        """Hash of every tensor (name, type, shape, bytes), of the trees and of the recipe."""
        header, tensors = self._packed()
        digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
        for name, tensor in sorted(tensors.items()):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, atomically; equal sets give equal bytes.

        Raises :class:`~ptq_tdq.errors.OutputError` when ``path`` cannot be written, :class:`CalibrationSetError` for
        an argument that a file cannot hold.
        """
        header, tensors = self._packed()
        metadata = json.dumps({**header, "sha256": self.sha256}, sort_keys=True)
        write_atomic(path, save(tensors, metadata={_METADATA_KEY: metadata}))

    @classmethod
    def load(cls, path: str | Path) -> Calls:
        """Read and verify a file of :meth:`save`.

        Raises :class:`CalibrationSetError` for a missing, truncated, foreign or altered file.
        """
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {})[_METADATA_KEY])
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a dict)
            groups = [_unpack_group(i, group, tensors) for i, group in enumerate(header["groups"])]
            loaded = cls(TimeAxis(**header["axis"]), groups, dict(header["recipe"]), tensors["trajectory"])
            intact = loaded.sha256 == header["sha256"]
        except FileNotFoundError as error:
            raise CalibrationSetError(f"There is no calibration set at '{path}'; check the path.") from error
        except (OSError, SafetensorError) as error:
            raise CalibrationSetError(
                f"The calibration set '{path}' is truncated or is no safetensors file; record it again ({error})."
            ) from error
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise CalibrationSetError(
                f"The file '{path}' is no calibration set of ptq-tdq, or its header was altered; record it again."
            ) from error
        if not intact:
            raise CalibrationSetError(
                f"The calibration set '{path}' was altered: its content does not match its hash; record it again."
            )
        return loaded

    def check(self) -> None:
        """Raise :class:`CalibrationSetError` for an empty set, and for NaN or Inf in a row, naming its argument and t."""
        if not len(self):
            raise CalibrationSetError("The calibration set is empty: no call of the denoiser was recorded.")
        t = self.t
        for group, span in self.spans():
            for name, value in group.tree.items():
                for leaf in pytree.tree_leaves(value):
                    rows = group.rows[leaf.index] if isinstance(leaf, Place) else None
                    # -inf is what additive attention masks are made of
                    if isinstance(rows, Tensor) and rows.is_floating_point() and "mask" not in name:
                        finite = torch.isfinite(rows).flatten(1).all(1)
                        if not bool(finite.all()):
                            where = t[span][~finite.cpu()][0].item()
                            raise CalibrationSetError(
                                f"The calibration set has NaN or Inf in '{name}' at time step t = {where:g}; "
                                "record it again with a healthy model."
                            )

    def _packed(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        tensors = {"trajectory": self.trajectory}
        groups = [_pack_group(i, group, tensors) for i, group in enumerate(self.groups)]
        header = {"axis": self.axis.to_dict(), "recipe": self.recipe, "groups": groups}
        return header, {name: value.cpu().contiguous() for name, value in tensors.items()}


@contextmanager
def record(model: nn.Module, *, time: str | None = None, num_train_timesteps: int | None = None) -> Iterator[Calls]:
    """Record the calls that a loop or a pipeline makes of ``model`` inside a ``with`` block.

    ``time`` names the argument that holds the time step, where it is none of the usual ones; ``num_train_timesteps``
    is the length of the scheduler's axis, where calls alone do not tell it. Outputs are left as they are::

        with ptq_tdq.record(unet) as calls:
            pipe(prompt, num_inference_steps=20)

    Raises :class:`~ptq_tdq.errors.ModelError` for a model without a time argument.
    """
    recorder = Recorder(model, time)
    with recorder.listening():
        yield recorder.calls
    recorder.calls.axis = find_axis(recorder.calls.axis.argument, recorder.seen, total=num_train_timesteps)


class Recorder:
    """Hears of every call of a model while :meth:`listening`, and keeps copies of their arguments on the CPU.

    ``seen`` are the values of the time argument, one per call. ``keep(arguments)`` may turn calls down.
    """

    def __init__(
        self, model: nn.Module, time: str | None = None, keep: Callable[[dict[str, Any]], bool] = lambda _: True
    ) -> None:
        self.model, self.keep = model, keep
        self.seen: list[float] = []
        self.calls = Calls(TimeAxis(time_argument(model, time)))
        self._first_trajectory, self._rows, self._began = 0, 0, 0
        self._shared: dict[Any, frozenset[int]] = {}  # of each form of call
        self._looking = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        handle = self.model.register_forward_pre_hook(self._hear, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def begin(self) -> None:
        """What follows are new trajectories."""
        self._first_trajectory += self._rows
        self._rows, self._began = 0, len(self.seen)

    def _hear(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._looking:
            return
        arguments, name = bind(module, args, kwargs), self.calls.axis.argument
        value = float(time_values(arguments.get(name), name).float().mean())
        turned = len(self.seen) - self._began > 1 and value == self.seen[self._began] != self.seen[-1]
        if turned:  # the sampler has come back to its first step
            self.begin()
        self.seen.append(value)
        self._rows = max(self._rows, count_rows(arguments, name))
        if self.keep(arguments):
            rows = torch.arange(count_rows(arguments, name))
            shared = self._find_shared(arguments, name)
            self.calls.add(pytree.tree_map(_copied, arguments), rows + self._first_trajectory, shared)

    def _find_shared(self, arguments: dict[str, Any], name: str) -> frozenset[int]:
        leaves, spec = pytree.tree_flatten(arguments)
        form = (str(spec), tuple(tuple(x.shape) if isinstance(x, Tensor) else None for x in leaves))
        if form not in self._shared:
            self._looking = True
            try:
                self._shared[form] = find_shared(self.model, arguments, name)
            finally:
                self._looking = False
        return self._shared[form]


def _copied(leaf: Any) -> Any:
    return leaf.detach().to("cpu", copy=True) if isinstance(leaf, Tensor) else leaf


def _length(group: Group) -> int:
    first = group.rows[0]
    return len(first.items) if isinstance(first, Each) else len(first)


def _time_leaf(group: Group, name: str) -> Tensor:
    found = group.rows[group.tree[name].index]
    assert isinstance(found, Tensor)
    return found


def _cat(a: Tensor | Each, b: Tensor | Each) -> Tensor | Each:
    if isinstance(a, Each) and isinstance(b, Each):
        return Each(a.items + b.items)
    assert isinstance(a, Tensor) and isinstance(b, Tensor)
    return torch.cat([a, b])


def _joinable(a: Group, b: Group) -> bool:
    """Whether calls of both groups could have been one call with more rows."""
    leaves_a, spec_a = pytree.tree_flatten(a.tree)
    leaves_b, spec_b = pytree.tree_flatten(b.tree)
    return (
        spec_a == spec_b
        and all(map(_same, leaves_a, leaves_b))
        and all(_form(x) == _form(y) for x, y in zip(a.rows, b.rows, strict=True))
    )


def _form(leaf: Tensor | Each) -> tuple[Any, ...]:
    return ("each",) if isinstance(leaf, Each) else (leaf.dtype, leaf.shape[1:])


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and bool(a == b)


# A tree in JSON: {"dict": {...}}, {"list": [...]}, {"tuple": [...]}, {"rows": place}, {"each": [place, n]},
# {"tensor": name}, or a plain value.


def _pack_group(number: int, group: Group, tensors: dict[str, Tensor]) -> Any:
    def pack(value: Any) -> Any:
        if isinstance(value, dict):
            return {"dict": {key: pack(item) for key, item in value.items()}}
        if isinstance(value, list | tuple):
            return {"list" if isinstance(value, list) else "tuple": [pack(item) for item in value]}
        if isinstance(value, Place):
            return _pack_rows(f"{number}.{value.index}", group.rows[value.index], tensors)
        if isinstance(value, Tensor):
            name = f"{number}.shared.{len(tensors)}"
            tensors[name] = value
            return {"tensor": name}
        if value is None or isinstance(value, bool | int | float | str):
            return {"value": value}
        raise CalibrationSetError(
            f"A call has an argument of type {type(value).__name__}, which a calibration set cannot hold in a file; "
            "call the denoiser with tensors and plain values."
        )

    return pack(group.tree)


def _pack_rows(name: str, rows: Tensor | Each, tensors: dict[str, Tensor]) -> Any:
    if isinstance(rows, Tensor):
        tensors[name] = rows
        return {"rows": name}
    names = [f"{name}.{i}" for i in range(len(rows.items))]
    tensors.update(zip(names, rows.items, strict=True))
    return {"each": names}


def _unpack_group(number: int, packed: Any, tensors: dict[str, Tensor]) -> Group:
    rows: list[Tensor | Each] = []

    def place(value: Tensor | Each) -> Place:
        rows.append(value)
        return Place(len(rows) - 1)

    def unpack(value: dict[str, Any]) -> Any:
        ((kind, content),) = value.items()
        if kind == "dict":
            return {key: unpack(item) for key, item in content.items()}
        if kind in ("list", "tuple"):
            items = [unpack(item) for item in content]
            return items if kind == "list" else tuple(items)
        if kind == "rows":
            return place(tensors[content])
        if kind == "each":
            return place(Each(tuple(tensors[name] for name in content)))
        return tensors[content] if kind == "tensor" else content

    tree = unpack(packed)
    return Group(tree, rows)


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
