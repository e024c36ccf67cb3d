"""What a denoiser does in one call, by watching it: its layers in order, its attention products, what depends on what.

Five forward passes on recorded calls tell everything that the plan needs, so nothing about any model family is written
down: two rows against one tell which tensors have rows; another x, another t, another condition tell what each layer's
input depends on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ptq_tdq.calls import Calls, Each, Group, Place, main_argument
from ptq_tdq.errors import ModelError
from ptq_tdq.modules.layers import layer_kind, layer_operation, multiply_accumulates

Source = str  # "x", "t" or "condition"
SDPA = functional.scaled_dot_product_attention
_PRODUCTS = {torch.matmul, torch.bmm, torch.baddbmm, torch.einsum, Tensor.matmul, Tensor.bmm, Tensor.__matmul__}


@dataclass
class TracedLayer:
    """A layer as one call used it.

    ``width`` is the number of channels of its input, ``parts`` the widths that were concatenated into it along the
    channels; ``macs`` are multiply-accumulates for one row; ``rows`` is the number of rows of its input for each sample
    (None where its input has none); ``sources`` is what its input depends on.
    """

    name: str
    module: nn.Module
    width: int
    axes: int
    parts: tuple[int, ...]
    macs: int = 0
    uses: int = 0
    rows: int | None = None
    faithful: bool = True  # its output is the plain operation on its weight
    sources: set[Source] = field(default_factory=set)


@dataclass
class Trace:
    """All that was seen. ``products`` counts the attention products of each module that computes some; ``matmuls`` are
    multiply-accumulates of other products of two activations, by the module that computes them.
    """

    layers: dict[str, TracedLayer]
    products: dict[str, int]
    product_macs: dict[str, int]
    matmuls: dict[str, int]


def trace(model: nn.Module, calls: Calls) -> Trace:
    """Watch ``model`` on rows of ``calls``; raises :class:`ModelError` where it cannot run two rows at once."""
    group = calls.groups[0]
    pair = torch.tensor([0, 1 if len(_first(group)) > 1 else 0])
    one, two = (group.arguments(index) for index in (pair[:1], pair))
    watcher = _Watcher(model)
    with watcher.watching():
        _run(model, one)
    counts = {name: watcher.leading[name] for name in watcher.layers}
    prints = dict(watcher.prints)
    with watcher.watching(again=True):
        _run(model, two)
    for name, layer in watcher.layers.items():
        k = counts[name]
        layer.rows = k if watcher.leading.get(name) == 2 * k else None
    for source, changed in _variations(calls, group, one).items():
        with watcher.watching(again=True):
            try:
                _run(model, changed)
            except (RuntimeError, ValueError, TypeError, IndexError):  # not every other value is one that it takes
                continue
        for name, layer in watcher.layers.items():
            if watcher.prints.get(name) != prints[name]:
                layer.sources.add(source)
    return Trace(watcher.layers, watcher.products, watcher.product_macs, watcher.matmuls)


def _run(model: nn.Module, arguments: dict[str, Any]) -> None:
    with torch.no_grad():
        model(**arguments)


def _first(group: Group) -> Any:
    rows = group.rows[0]
    return rows.items if isinstance(rows, Each) else rows


def _variations(calls: Calls, group: Group, one: dict[str, Any]) -> dict[Source, dict[str, Any]]:
    """The call ``one`` with another x, another t, and another condition (where there is one to vary)."""
    time = calls.axis.argument
    main = main_argument(one, time)
    found: dict[Source, dict[str, Any]] = {"x": {**one, main: pytree.tree_map(_other_values, one[main])}}
    found["t"] = {**one, time: _other_time(group, time, one[time])}
    condition = {
        name: _other_rows(group, tree, one[name]) for name, tree in group.tree.items() if name not in (time, main)
    }
    found["condition"] = {**one, **condition}
    return found


def _other_values(leaf: Any) -> Any:
    """Values of the same size that are not the same."""
    return leaf.roll(1, -1) * -0.9 + 0.01 if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def _other_time(group: Group, name: str, value: Tensor) -> Tensor:
    leaf = group.rows[group.tree[name].index]
    assert isinstance(leaf, Tensor)
    differs = (leaf != value).flatten(1).any(1) if leaf.ndim > 1 else leaf != value
    if bool(differs.any()):
        return leaf[differs][:1]
    return value / 2 if value.is_floating_point() else value // 2 + (value < 2)


def _other_rows(group: Group, tree: Any, value: Any) -> Any:
    """Each leaf of one argument from a row where it differs; real numbers that never differ are changed."""

    def other(place: Any, now: Any) -> Any:
        if not isinstance(place, Place):
            return now
        rows = group.rows[place.index]
        if isinstance(rows, Each):
            return [_other_values(x) for x in now]
        flat = rows.flatten(1) if rows.ndim > 1 else rows[:, None]
        differs = (flat != (now.flatten(1) if now.ndim > 1 else now[:, None])).any(1)
        if bool(differs.any()):
            return rows[differs][:1]
        binary = bool(((now == 0) | (now == 1)).all())
        return now if binary else _other_values(now)

    leaves, spec = pytree.tree_flatten(tree)
    values = spec.flatten_up_to(value)
    return pytree.tree_unflatten([other(p, v) for p, v in zip(leaves, values, strict=True)], spec)


class _Watcher:
    """Hooks on all layers, and a mode that sees products and concatenations."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.layers: dict[str, TracedLayer] = {}
        self.leading: dict[str, int] = {}
        self.prints: dict[str, tuple[float, ...]] = {}
        self.products: dict[str, int] = {}
        self.product_macs: dict[str, int] = {}
        self.matmuls: dict[str, int] = {}
        self.stack: list[str] = [""]

    @contextmanager
    def watching(self, again: bool = False) -> Iterator[None]:
        """``again``: look at inputs only; what there is was seen before."""
        self.leading, self.prints = {}, {}
        with ExitStack() as hooks:
            for name, module in self.model.named_modules():
                handle = module.register_forward_pre_hook(self._enter(name, again))
                hooks.callback(handle.remove)
                handle = module.register_forward_hook(self._leave(name, again), always_call=True)
                hooks.callback(handle.remove)
            if not again:
                hooks.enter_context(_Functions(self))
            yield

    def _enter(self, name: str, again: bool) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            self.stack.append(name)
            if layer_kind(module) is None or not args or not isinstance(args[0], Tensor):
                return
            x = args[0]
            if name not in self.leading:
                self.leading[name], self.prints[name] = len(x), _fingerprint(x)
            if not again:
                self._see(name, module, x)

        return hook

    def _see(self, name: str, module: nn.Module, x: Tensor) -> None:
        kind = layer_kind(module)
        linear = kind == "linear"
        # dim 1 holds tokens in [B, N, C], and a grouped weight has no columns for a second range
        channels = (not linear or x.ndim == 2) and getattr(module, "groups", 1) == 1
        parts = self.mode.parts(x) if channels else ()
        layer = self.layers.setdefault(
            name, TracedLayer(name, module, x.shape[-1 if linear else 1], x.ndim, parts)
        )
        layer.uses += 1

    def _leave(self, name: str, again: bool) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self.stack.pop()
            if again or name not in self.layers or not isinstance(output, Tensor):
                return
            layer = self.layers[name]
            layer.macs += multiply_accumulates(module, output)
            if layer.uses == 1:
                expected = layer_operation(module, args[0])
                layer.faithful = expected.shape == output.shape and torch.equal(expected, output)

        return hook

    mode: _Functions


class _Functions(TorchFunctionMode):
    """Sees scaled dot products, other products of two activations, and the widths of what torch.cat joins along dim 1."""

    def __init__(self, watcher: _Watcher) -> None:
        super().__init__()
        self.watcher = watcher
        watcher.mode = self
        self.made: list[tuple[Tensor, tuple[int, ...]]] = []  # the tensors stay alive, so identity is unambiguous

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        owner = self.watcher.stack[-1]
        if func is SDPA:
            q, k, v = (*args, *(kwargs[n] for n in ("query", "key", "value") if n in kwargs))[:3]
            self.watcher.products[owner] = self.watcher.products.get(owner, 0) + 1
            macs = q.shape[:-1].numel() * k.shape[-2] * (q.shape[-1] + v.shape[-1]) // len(q)
            self.watcher.product_macs[owner] = self.watcher.product_macs.get(owner, 0) + macs
        elif func in _PRODUCTS and isinstance(result, Tensor):
            operands = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            if len(operands) >= 2 and not any(isinstance(x, nn.Parameter) for x in operands):
                inner = operands[-2].shape[-1] if operands[-2].ndim else 1
                macs = result.numel() * inner // max(1, len(result))
                self.watcher.matmuls[owner] = self.watcher.matmuls.get(owner, 0) + macs
        elif func is torch.cat:
            dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
            if dim == 1:
                tensors = args[0] if args else kwargs["tensors"]
                self.made.append((result, tuple(part.shape[1] for part in tensors)))
        return result

    def parts(self, x: Tensor) -> tuple[int, ...]:
        """The widths that were joined into ``x``."""
        return next(
            (widths for made, widths in self.made if made.data_ptr() == x.data_ptr() and made.shape == x.shape), ()
        )


def _fingerprint(x: Tensor) -> tuple[float, ...]:
    """Numbers that are equal for equal tensors and differ for others, for all that matters here."""
    flat = x.detach().flatten().double()
    return (flat.sum().item(), flat.square().sum().item(), flat[0].item(), flat[-1].item()) if len(flat) else ()


def require_rows(model: nn.Module, calls: Calls) -> None:
    """Raise :class:`ModelError` for a model that does not take one time step per row."""
    group = calls.groups[0]
    try:
        _run(model, group.arguments(torch.tensor([0, 0])))
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise ModelError(
            f"{type(model).__name__} cannot be called with two rows of the recorded calls at once "
            f"({str(error).splitlines()[0]}); calibration needs batches."
        ) from error
