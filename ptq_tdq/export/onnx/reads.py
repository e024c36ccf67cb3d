"""What a model's code reads from tensors while it runs: lengths, positions, decisions.

A graph is one code for all calls, and while a model is traced its tensors have no values. So the model is run once
before (:func:`listen`), and tracing gets the answers of that run (:class:`Answers`). They hold for other calls too if
the inputs that they follow from are part of the graph, or, of decisions, if the graph checks that they are the same.
What is read in any other way than the table says fails while the model is traced, so no answer is taken for granted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakIdKeyDictionary

from ptq_tdq.errors import ModelError
from ptq_tdq.hooks import hooked

DECISION, ITEM, MASK, REPEATS = "bool", "item", "mask as an index", "repeat_interleave"
LIST = "tolist"  # a tensor that is traced gives its list item by item
# These give Python the values of a tensor, or as many values as they say.
_METHODS = ("__bool__", "__float__", "__index__", "__int__", "item", "numpy", "tolist")
_FUNCTIONS = ("bincount", "nonzero", "unique")
_VALUES = {
    **{getattr(Tensor, name): name.strip("_") for name in (*_METHODS, *_FUNCTIONS)},
    **{getattr(torch, name): name for name in _FUNCTIONS},
}
_INDEXING = (Tensor.__getitem__, Tensor.__setitem__)
_REPEATING = (Tensor.repeat_interleave, torch.repeat_interleave)


@dataclass(frozen=True)
class Read:
    """One answer, the names of the inputs that it follows from, and the innermost module that asked."""

    name: str
    answer: Any
    sources: frozenset[str]
    module: nn.Module


def what_is_read(func: Any, args: tuple[Any, ...]) -> tuple[str, Any] | None:
    """The name of a read, and the tree of tensors whose values are read; None for every other function."""
    if func in _VALUES:
        return _VALUES[func], args[:1]
    if func in _INDEXING and any(map(_is_mask, pytree.tree_leaves(args[1]))):
        return MASK, [index for index in pytree.tree_leaves(args[1]) if _is_mask(index)]
    if func in _REPEATING and len(args) > 1 and isinstance(args[1], Tensor):
        return REPEATS, args[1:2]
    return None


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype == torch.bool


def _ask(name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The answer: what Python gets, or the numbers that stand for a mask or for repeats."""
    if name == MASK:
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        return [part.nonzero(as_tuple=True) if _is_mask(part) else None for part in index]
    if name == REPEATS:
        return torch.arange(len(args[1]), device=args[1].device).repeat_interleave(args[1])
    return func(*args, **kwargs)


def _use(name: str, answer: Any, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The function's result by an answer."""
    if name == MASK:
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        parts = [(part,) if numbers is None else numbers for part, numbers in zip(index, answer, strict=True)]
        return func(args[0], tuple(part for some in parts for part in some), *args[2:])
    if name == REPEATS:
        dim = args[2] if len(args) > 2 else kwargs.get("dim")
        return (args[0].flatten() if dim is None else args[0]).index_select(dim or 0, answer)
    return answer


def listen(module: nn.Module, tensors: dict[str, Tensor]) -> list[Read]:
    """What is read in one call of ``module`` with a dictionary of tensors."""
    inside: list[nn.Module] = []

    def enter(own: nn.Module, _: Any) -> None:
        inside.append(own)

    def leave(*_: Any) -> None:
        inside.pop()

    hooks = [inner.register_forward_pre_hook(enter) for inner in module.modules()]
    hooks += [inner.register_forward_hook(leave) for inner in module.modules()]
    listener = _Listener(tensors, inside)
    with hooked(hooks), torch.no_grad(), listener:
        module(tensors)
    return listener.reads


class _Listener(TorchFunctionMode):
    """Keeps the answers, and of each tensor from which inputs it was computed."""

    def __init__(self, tensors: dict[str, Tensor], inside: list[nn.Module]) -> None:
        super().__init__()
        self.reads: list[Read] = []
        self._inside = inside
        self._sources = WeakIdKeyDictionary()
        for name, tensor in tensors.items():
            self._sources[tensor] = frozenset({name})

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if found := what_is_read(func, args):
            name, subject = found
            answer = _ask(name, func, args, kwargs)
            answers = pytree.tree_leaves(answer) if name == LIST else [answer]
            name, sources = ITEM if name == LIST else name, self._of(subject)
            self.reads += [Read(name, answer, sources, self._inside[-1]) for answer in answers]
        result, name = func(*args, **kwargs), getattr(func, "__name__", "")
        if not name.endswith("_like") and not name.startswith("new_"):  # these take but the shape
            self._mark((result, args[:1]) if _writes(name) else result, self._of((args, kwargs)))
        return result

    def _of(self, tree: Any) -> frozenset[str]:
        found = [x for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor) for x in (leaf, leaf._base)]
        return frozenset().union(*(self._sources.get(x, ()) for x in found if x is not None))

    def _mark(self, tree: Any, sources: frozenset[str]) -> None:
        """Also of what is written into: of the tensor that a view shows."""
        for x in pytree.tree_leaves(tree):
            for tensor in (x, x._base) if isinstance(x, Tensor) else ():
                if tensor is not None and sources:
                    self._sources[tensor] = self._of(tensor) | sources


def _writes(name: str) -> bool:
    """Whether a function of this name writes into its first argument."""
    return name.startswith(("__setitem__", "__i")) or (name.endswith("_") and not name.endswith("__"))


class Answers:
    """Gives the answers of an earlier run, one after the other; ``checks`` are bool [1], for each decision one.

    Decisions that follow from the inputs ``held`` alone need no check. Other masks become numbers in the graph.
    """

    def __init__(self, reads: list[Read], held: frozenset[str]) -> None:
        self._reads, self._held = iter(reads), held
        self.checks: list[Tensor] = []

    def result(self, name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The function's result; raises :class:`ModelError` where the model's code is another than in that run."""
        read = next(self._reads, None)
        if read is None or read.name != name:
            raise ModelError(f"The model's code is another while it is traced ({name}), so no graph holds it.")
        answer = read.answer
        if not read.sources <= self._held and name == MASK:
            answer = _ask(name, func, args, kwargs)
        elif not read.sources <= self._held:
            self.checks.append((args[0] != 0).reshape(1) == answer)
        return _use(name, answer, func, args, kwargs)
