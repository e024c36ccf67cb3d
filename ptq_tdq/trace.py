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
from ptq_tdq.calls.arguments import REFUSALS
from ptq_tdq.errors import ModelError
from ptq_tdq.modules.layers import layer_input, layer_kind, layer_operation, multiply_accumulates, weight_groups

Source = str  # "x", "t" or "condition"
SDPA = functional.scaled_dot_product_attention
_MATMULS = {torch.matmul, torch.bmm, torch.baddbmm, torch.einsum, Tensor.matmul, Tensor.bmm, Tensor.__matmul__}
_CONVOLUTIONS = {
    *(torch.conv1d, torch.conv2d, torch.conv3d),
    *(torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d),
}
_GROUPED = {f for m in (torch, functional) for n in ("_grouped_mm", "grouped_mm") if (f := getattr(m, n, None))}
_CLOSE = 0.02  # relative difference of one row computed alone and beside another


@dataclass
class TracedLayer:
    """A layer as one call used it.

    ``width`` is the number of channels of its input, ``parts`` the widths that were concatenated into it along the
    channels; ``macs`` are multiply-accumulates for one row; ``rows`` is the number of rows of its input for each sample
    (None where its input has none, or not one sample after the other); ``sources`` is what its input depends on.
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
    """All that was seen.

    ``products`` counts the attention products of each module that computes some, ``mixed`` are those modules whose
    products do not have the rows of one sample after the other. ``matmuls`` are multiply-accumulates of other products
    of two activations, ``loose`` those with parameters that no layer holds, by the module that computes them;
    ``unused`` are layers that were never called.
    """

    layers: dict[str, TracedLayer]
    products: dict[str, int]
    mixed: set[str]
    product_macs: dict[str, int]
    matmuls: dict[str, int]
    loose: dict[str, int]
    unused: list[str]


def trace(model: nn.Module, calls: Calls) -> Trace:
    """Watch ``model`` on rows of ``calls``; raises :class:`ModelError` where it cannot run two rows at once."""
    group = calls.groups[0]
    pair = torch.tensor([0, 1 if len(group) > 1 else 0])
    one, two = (group.arguments(index) for index in (pair[:1], pair))
    watcher = _Watcher(model)
    alone = watcher.look(one)
    together = watcher.look(two, again=True)
    for name, layer in watcher.layers.items():
        layer.rows = _rows(alone.inputs[name], together.inputs.get(name, []))
    mixed = {name for name, of in alone.products.items() if _rows(of, together.products.get(name, [])) is None}
    moving: set[str] = set()
    for source, changed in _variations(calls, group, one).items():
        try:
            other = watcher.look(changed, again=True)
        except REFUSALS:  # not every other value is one that it takes
            continue
        for name, layer in watcher.layers.items():
            if other.inputs.get(name, [])[:1] != alone.inputs[name][:1]:
                layer.sources.add(source)
        moving |= {name for name, prints in other.matmuls.items() if prints != alone.matmuls.get(name)}
    return Trace(
        watcher.layers,
        {name: len(of) for name, of in alone.products.items()},
        mixed,
        watcher.product_macs,
        {name: macs for name, macs in watcher.matmuls.items() if name in moving},
        watcher.loose,
        [name for name, m in model.named_modules() if layer_kind(m) and name not in watcher.layers],
    )


@dataclass(frozen=True)
class Print:
    """Of a tensor [n, ...]: its shape, and numbers that are equal for equal tensors and differ for others, for all that
    matters here.
    """

    shape: tuple[int, ...]
    numbers: tuple[float, ...]  # sum, sum of squares, first and last value; the last two for the first half of the rows
    half: tuple[float, ...]

    @classmethod
    def of(cls, x: Tensor) -> Print:
        x = x.detach()
        return cls(tuple(x.shape), _numbers(x), _numbers(x[: len(x) // 2]) if x.ndim and len(x) % 2 == 0 else ())


def _numbers(x: Tensor) -> tuple[float, ...]:
    flat = x.flatten().double()
    return (flat.sum().item(), flat.square().sum().item(), flat[0].item(), flat[-1].item()) if len(flat) else ()


def _rows(alone: list[Print], together: list[Print]) -> int | None:
    """Rows for each sample, from the same tensors with the first sample and with two; None where there are none."""
    if len(alone) != len(together) or not all(map(_first_half, alone, together)):
        return None
    return alone[0].shape[0]


def _first_half(one: Print, two: Print) -> bool:
    if not one.shape or two.shape[:1] != (2 * one.shape[0],):
        return False
    if one.shape[1:] != two.shape[1:] or not one.numbers:  # padded to another length
        return True
    _, squares, *ends = one.numbers
    _, other_squares, *other_ends = two.half
    size = (squares / max(1, torch.Size(one.shape).numel())) ** 0.5
    differ = any(abs(a - b) > _CLOSE * (size + abs(a)) for a, b in zip(ends, other_ends, strict=True))
    return not (differ or abs(squares - other_squares) > _CLOSE * squares)  # NaN tells nothing


def _run(model: nn.Module, arguments: dict[str, Any]) -> None:
    with torch.no_grad():
        model(**arguments)


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
    differs = leaf != value.to(leaf.device)
    differs = differs.flatten(1).any(1) if leaf.ndim > 1 else differs
    if bool(differs.any()):
        return leaf[differs][:1].to(value.device)
    return value / 2 if value.is_floating_point() else value // 2 + (value < 2)


def _other_rows(group: Group, tree: Any, value: Any) -> Any:
    """Each leaf of one argument from a row where it differs; real numbers that never differ are changed."""

    def other(place: Any, now: Any) -> Any:
        if not isinstance(place, Place):
            return now
        rows = group.rows[place.index]
        if isinstance(rows, Each):
            return [_other_values(x) for x in now]
        known = now.to(rows.device).reshape(1, -1)
        differs = (rows.reshape(len(rows), -1) != known).any(1)
        if bool(differs.any()):
            return rows[differs][:1].to(now.device).reshape(now.shape)
        binary = bool(((now == 0) | (now == 1)).all())
        return now if binary else _other_values(now)

    leaves, spec = pytree.tree_flatten(tree)
    values = spec.flatten_up_to(value)
    return pytree.tree_unflatten([other(p, v) for p, v in zip(leaves, values, strict=True)], spec)


class _Run:
    """What one forward pass showed, in order: inputs of layers, queries of attention products, results of others."""

    def __init__(self) -> None:
        self.inputs: dict[str, list[Print]] = {}
        self.products: dict[str, list[Print]] = {}
        self.matmuls: dict[str, list[Print]] = {}


class _Watcher:
    """Hooks on all layers, and a mode that sees products and concatenations; what there is, the first run tells."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules = dict(model.named_modules())
        self.storages = {_memory(p) for p in model.parameters()}
        self.layers: dict[str, TracedLayer] = {}
        self.product_macs: dict[str, int] = {}
        self.matmuls: dict[str, int] = {}
        self.loose: dict[str, int] = {}

    def look(self, arguments: dict[str, Any], again: bool = False) -> _Run:
        """Run the model; ``again``: to compare with the first run."""
        self.run, self.again, self.stack = _Run(), again, [""]
        with self._watching():
            _run(self.model, arguments)
        return self.run

    @contextmanager
    def _watching(self) -> Iterator[None]:
        with ExitStack() as hooks:
            for name, module in self.modules.items():
                hooks.callback(module.register_forward_pre_hook(self._enter(name), with_kwargs=True).remove)
                hooks.callback(
                    module.register_forward_hook(self._leave(name), with_kwargs=True, always_call=True).remove
                )
            self.mode = hooks.enter_context(_Functions(self))
            yield

    def _enter(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            self.stack.append(name)
            x = layer_input(args, kwargs) if layer_kind(module) else None
            if x is None:
                return
            self.run.inputs.setdefault(name, []).append(Print.of(x))
            if not self.again:
                self._see(name, module, x)

        return hook

    def _see(self, name: str, module: nn.Module, x: Tensor) -> None:
        linear = layer_kind(module) == "linear"
        # dim 1 holds tokens in [B, N, C], and a grouped weight has no columns for a second range
        channels = (not linear or x.ndim == 2) and weight_groups(module) == 1
        parts = self.mode.parts(x) if channels else ()
        new = TracedLayer(name, module, x.shape[-1 if linear else 1], x.ndim, parts)
        self.layers.setdefault(name, new).uses += 1

    def _leave(self, name: str) -> Callable[[nn.Module, Any, Any, Any], None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            x = layer_input(args, kwargs)
            if not self.again and name in self.layers and isinstance(output, Tensor) and x is not None:
                layer = self.layers[name]
                layer.macs += multiply_accumulates(module, x, output)
                if layer.uses == 1:
                    expected = layer_operation(module, x)
                    same = expected.shape == output.shape
                    layer.faithful = same and torch.equal(expected.nan_to_num(), output.nan_to_num())
            self.stack.pop()

        return hook


class _Functions(TorchFunctionMode):
    """Sees scaled dot products, other products, and the widths of what torch.cat joins along dim 1."""

    def __init__(self, watcher: _Watcher) -> None:
        super().__init__()
        self.watcher = watcher
        self.made: list[tuple[Tensor, tuple[int, ...]]] = []  # the tensors stay alive, so identity is unambiguous

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is SDPA:
            self._attention(*(*args, *(kwargs[n] for n in ("query", "key", "value") if n in kwargs))[:3])
        elif func in _MATMULS | _CONVOLUTIONS | _GROUPED or func is functional.linear:
            if isinstance(result, Tensor) and layer_kind(self.watcher.modules[self.watcher.stack[-1]]) is None:
                operands = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
                self._product(func, operands, result)
        elif func is torch.cat:
            dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
            if dim == 1:
                tensors = args[0] if args else kwargs["tensors"]
                self.made.append((result, tuple(part.shape[1] for part in tensors)))
        return result

    def _attention(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        watcher, owner = self.watcher, self.watcher.stack[-1]
        watcher.run.products.setdefault(owner, []).append(Print.of(q))
        if not watcher.again:
            macs = q.shape[:-1].numel() * k.shape[-2] * (q.shape[-1] + v.shape[-1])
            watcher.product_macs[owner] = watcher.product_macs.get(owner, 0) + macs

    def _product(self, func: Any, operands: list[Tensor], result: Tensor) -> None:
        """Any other product: of activations, or with a parameter that is held by no layer."""
        watcher, owner = self.watcher, self.watcher.stack[-1]
        held = [x for x in operands if _memory(x) in watcher.storages]
        if len(operands) < 2 or len(held) == len(operands):
            return
        if not held:
            watcher.run.matmuls.setdefault(owner, []).append(Print.of(result))
        if not watcher.again:
            left = operands[-2] if func in _MATMULS else operands[0]
            inner = operands[1][0].numel() if func in _CONVOLUTIONS else left.shape[-1] if left.ndim else 1
            counts = watcher.loose if held else watcher.matmuls
            counts[owner] = counts.get(owner, 0) + result.numel() * inner

    def parts(self, x: Tensor) -> tuple[int, ...]:
        """The widths that were joined into ``x``."""
        return next((widths for made, widths in self.made if _memory(made) == _memory(x) and made.shape == x.shape), ())


def _memory(x: Tensor) -> int:
    """Equal for tensors that share memory."""
    place: int = x.untyped_storage()._cdata
    return place


def require_rows(model: nn.Module, calls: Calls) -> None:
    """Raise :class:`ModelError` for a model that does not take one time step per row."""
    group = calls.groups[0]
    try:
        _run(model, group.arguments(torch.tensor([0, 0])))
    except REFUSALS as error:
        raise ModelError(
            f"{type(model).__name__} cannot be called with two rows of the recorded calls at once "
            f"({str(error).splitlines()[0]}); calibration needs batches."
        ) from error
