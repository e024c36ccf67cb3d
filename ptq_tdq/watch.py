"""Watches one forward pass: layers in order, products, concatenations, multiply-accumulates, prints of tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ptq_tdq.calls import fresh
from ptq_tdq.hooks import hooked
from ptq_tdq.modules.layers import (
    layer_input,
    layer_kind,
    layer_operation,
    multiply_accumulates,
    own_weight,
    weight_groups,
)

Source = str  # "x", "t" or "condition"
SDPA, MULTI_HEAD = functional.scaled_dot_product_attention, functional.multi_head_attention_forward
_MATMULS = {torch.matmul, torch.bmm, torch.baddbmm, torch.einsum, Tensor.matmul, Tensor.bmm, Tensor.__matmul__}
_CONVOLUTIONS = {
    *(torch.conv1d, torch.conv2d, torch.conv3d),
    *(torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d),
}
_BY_ROWS = {  # whose multiply-accumulates are the rows of the first operand times the elements of all weights
    *(torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu, functional.bilinear),
    *(torch.lstm_cell, torch.gru_cell, torch.rnn_tanh_cell, torch.rnn_relu_cell),
}
_GROUPED = {f for m in (torch, functional) for n in ("_grouped_mm", "grouped_mm") if (f := getattr(m, n, None))}
_PRODUCTS = {*_MATMULS, *_CONVOLUTIONS, *_BY_ROWS, *_GROUPED, functional.linear}


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
    faithful: bool = True  # at each use its output is the plain operation on its input and its weight
    sources: set[Source] = field(default_factory=set)

    @property
    def unbatched(self) -> bool:
        """Whether its input has no axis of rows, as a vector that a linear layer is given."""
        return self.axes < own_weight(self.module).ndim


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
    flat = (torch.view_as_real(x) if x.is_complex() else x).flatten().double()
    return (flat.sum().item(), flat.square().sum().item(), flat[0].item(), flat[-1].item()) if len(flat) else ()


@dataclass(frozen=True)
class Product:
    """A product that is neither a layer's nor attention in one function; ``held``: with a parameter of the model."""

    macs: int
    held: bool
    operands: tuple[Print, ...]


class Run:
    """What one forward pass of ``rows`` showed, in order: inputs of layers, queries of attention, other products."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.inputs: dict[str, list[Print]] = {}
        self.products: dict[str, list[Print]] = {}
        self.others: dict[str, list[Product]] = {}


class Watcher:
    """Hooks on all layers, and a mode that sees products and concatenations; what there is, the first run tells."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules = dict(model.named_modules())
        self.parameters = {id(p) for p in model.parameters()}
        self.storages = {memory(p) for p in model.parameters()}
        self.layers: dict[str, TracedLayer] = {}
        self.called: Counter[str] = Counter()  # how often each module was; a container never is
        self.elsewhere: dict[str, TracedLayer] = {}  # those that later runs alone call
        self.fused: dict[str, int] = {}
        self.given: dict[str, tuple[Tensor, Tensor | None]] = {}  # to layers at work; what each is to make of it
        self.taken: set[int] = set()  # memory of what fused functions were given

    def look(self, arguments: dict[str, Any], again: bool = False, rows: int = 1) -> Run:
        """Run the model on so many rows; ``again``: to compare with the first run."""
        self.run, self.again, self.stack = Run(rows), again, [""]
        with self._watching(), torch.no_grad():
            self.output = self.model(**fresh(arguments))
        return self.run

    def saw(self, name: str, layer: nn.Module) -> bool:
        """Whether a layer was called, by any of its names, or its weight taken by a function that is no layer."""
        weight, called = own_weight(layer), self.layers | self.elsewhere
        if name in called or memory(weight) in self.taken:
            return True
        return any(weight is own_weight(other.module) for other in called.values())

    @contextmanager
    def _watching(self) -> Iterator[None]:
        handles = []
        for name, module in self.modules.items():
            handles.append(module.register_forward_pre_hook(self._enter(name), prepend=True, with_kwargs=True))
            handles.append(module.register_forward_hook(self._leave(name), with_kwargs=True, always_call=True))
        with hooked(handles), _Functions(self) as self.mode:
            yield

    def _enter(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            self.stack.append(name)
            self.called[name] += not self.again
            tensors = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
            x = next(tensors, None) if layer_kind(module) else None
            if x is None:
                return
            self.run.inputs.setdefault(name, []).append(Print.of(x))
            if not self.again or name not in self.layers:
                self._see(name, module, x)
            self.given[name] = x, self._plain(module, args, kwargs)

        return hook

    def _plain(self, module: nn.Module, args: Any, kwargs: Any) -> Tensor | None:
        """The plain operation on one input and the layer's own parameters; None where there may be more."""
        x, own = layer_input(args, kwargs), [p for p in module._parameters.values() if p is not None]
        if x is None or len(args) + len(kwargs) > 1 or "weight" not in module._parameters:
            return None
        if any(id(p) not in self.parameters or p.is_complex() or not p.numel() for p in own):
            return None
        try:
            return layer_operation(module, x)
        except RuntimeError:  # something makes x fit first
            return None

    def _see(self, name: str, module: nn.Module, x: Tensor) -> None:
        linear = layer_kind(module) == "linear"
        # dim 1 holds tokens in [B, N, C], and a grouped weight has no columns for a second range
        channels = (not linear or x.ndim == 2) and weight_groups(module) == 1
        parts = self.mode.parts(x) if channels else ()
        new = TracedLayer(name, module, x.shape[-1 if linear else 1], x.ndim, parts)
        layers = self.elsewhere if self.again else self.layers
        layers.setdefault(name, new).uses += 1

    def _leave(self, name: str) -> Callable[[nn.Module, Any, Any, Any], None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self.stack.pop()
            x, expected = self.given.pop(name, (None, None))
            if x is None or output is None:  # it raised
                return
            macs = multiply_accumulates(module, x, output) if isinstance(output, Tensor) else 0
            layer = self.layers.get(name) or self.elsewhere[name]
            if not self.again:
                layer.macs += macs
            elif name in self.elsewhere:
                layer.macs = macs * len(self.run.inputs[name]) // self.run.rows
            kept = layer_input(args, kwargs) is x  # no hook gives another input
            layer.faithful = layer.faithful and kept and _same(expected, output)

        return hook


def _same(expected: Tensor | None, output: Any) -> bool:
    if expected is None or not isinstance(output, Tensor) or expected.dtype != output.dtype:
        return False
    return expected.shape == output.shape and torch.equal(expected.nan_to_num(), output.nan_to_num())


class _Functions(TorchFunctionMode):
    """Sees scaled dot products, other products, and the widths of what torch.cat joins along dim 1."""

    def __init__(self, watcher: Watcher) -> None:
        super().__init__()
        self.watcher = watcher
        self.made: list[tuple[Tensor, tuple[int, ...]]] = []  # the tensors stay alive, so identity is unambiguous

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is SDPA:
            self._attention(args[0] if args else kwargs["query"])
        elif func is MULTI_HEAD:
            self._multi_head(*args, **kwargs)
        elif func in _PRODUCTS:
            first = result[0] if isinstance(result, tuple) else result
            if isinstance(first, Tensor) and layer_kind(self.watcher.modules[self.watcher.stack[-1]]) is None:
                operands = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
                self._product(func, operands, first)
        elif func is torch.cat:
            dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
            if dim == 1:
                tensors = args[0] if args else kwargs["tensors"]
                self.made.append((result, tuple(part.shape[1] for part in tensors)))
        return result

    def _attention(self, q: Tensor) -> None:
        self.watcher.run.products.setdefault(self.watcher.stack[-1], []).append(Print.of(q))

    def _multi_head(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> None:
        """torch's own attention on tokens [N, (B,) E]: four projections and two products in one function."""
        watcher, owner = self.watcher, self.watcher.stack[-1]
        tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        watcher.taken.update(map(memory, tensors))
        if not watcher.again:
            projections = query.shape[-1] * (2 * query.numel() + key.numel() + value.numel())
            macs = projections + 2 * query.numel() * len(key)
            watcher.fused[owner] = watcher.fused.get(owner, 0) + macs

    def _product(self, func: Any, operands: list[Tensor], result: Tensor) -> None:
        """Any other product: of activations, or with a weight that is held by no layer."""
        held = [x for x in operands if memory(x) in self.watcher.storages]
        if len(operands) < 2 or len(held) == len(operands):
            return
        left = operands[-2] if func in _MATMULS else operands[0]
        if func in _BY_ROWS:
            macs = left[..., 0].numel() * sum(x.numel() for x in held if x.ndim > 1)
        else:
            macs = result.numel() * (
                operands[1][0].numel() if func in _CONVOLUTIONS else left.shape[-1] if left.ndim else 1
            )
        product = Product(macs, bool(held), () if held else tuple(map(Print.of, operands)))
        self.watcher.run.others.setdefault(self.watcher.stack[-1], []).append(product)

    def parts(self, x: Tensor) -> tuple[int, ...]:
        """The widths that were joined into ``x``."""
        return next((widths for made, widths in self.made if memory(made) == memory(x) and made.shape == x.shape), ())


def memory(x: Tensor) -> int:
    """Equal for tensors that share memory."""
    place: int = x.untyped_storage()._cdata
    return place
