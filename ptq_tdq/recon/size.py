"""What a run will hold: bytes of each unit for one sample, and places of its weights, counted in one forward pass."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ptq_tdq.hooks import hooked
from ptq_tdq.modules import ActivationQuantizer, QuantLayer, QuantProduct
from ptq_tdq.modules.products import BLOCK, in_blocks
from ptq_tdq.quantized_model import QuantizedModel
from ptq_tdq.recon.unit import MOST
from ptq_tdq.watch import memory

WORKING_BYTES = 2 << 30  # of what a step of learning makes
BLOCK_BYTES = 8 * 4 * BLOCK  # scores, probabilities and codes of a block, with their gradients


@dataclass
class UnitSize:
    """One unit with one sample, in bytes.

    ``made`` is all that its operations make, which is about what a learning step keeps, ``most`` what is alive at once.
    Attention products are made block by block while something is learned, and whole while they are observed.
    When it is called, ``given`` of units before it is still alive, and ``own`` of what the model has made in between;
    ``inputs`` are its arguments, ``outputs`` what it gives; ``held`` is what is alive of all that when one of its
    layers is called, at most. ``places`` is at how many places of its input each layer's
    weight is multiplied.
    """

    made: int = 0
    most: int = 0
    given: int = 0
    own: int = 0
    inputs: int = 0
    outputs: int = 0
    held: int = 0
    places: dict[str, int] = field(default_factory=dict)

    def waiting(self, budget: int) -> int:
        """Samples of which runs in both streams may wait at a layer of the unit, within so many bytes."""
        return budget // max(1, 2 * self.held)


def unit_sizes(quantized: QuantizedModel, arguments: dict[str, Any]) -> dict[str, UnitSize]:
    """The size of each unit, by a call with one sample; "" stands for what is in no unit."""
    counter = _Counter()
    handles = []
    for name in quantized.units():
        module = quantized.model.get_submodule(name)
        handles.append(module.register_forward_pre_hook(partial(counter.enter, name), with_kwargs=True))
        handles.append(module.register_forward_hook(counter.leave))
    for layer in quantized.layers().values():
        handles += [layer.register_forward_pre_hook(counter.reach), layer.register_forward_hook(counter.place)]
    for product in quantized.model.modules():
        if isinstance(product, QuantProduct) and in_blocks(product.record):
            handles.append(product.register_forward_pre_hook(counter.begin, with_kwargs=True))
            handles.append(product.register_forward_hook(counter.kept, with_kwargs=True))
    with hooked(handles), torch.no_grad(), _watched(quantized, counter), counter:
        quantized(**arguments)
    return counter.sizes


def at_once(size: UnitSize) -> int:
    """Samples that a unit runs with: as many as a step of learning holds in memory, and a power of two."""
    some = max(1, WORKING_BYTES // max(1, size.made, size.most))
    return min(MOST, 1 << some.bit_length() - 1)


def stream_bytes(sizes: dict[str, UnitSize], samples: int) -> int:
    """What both streams hold at once."""
    return 2 * samples * max(size.given + size.own + size.inputs + size.outputs for size in sizes.values())


@contextmanager
def _watched(model: nn.Module, counter: _Counter) -> Iterator[None]:
    """While open, each quantizer counts as if it were on: attention is computed step by step."""
    quantizers = [m for m in model.modules() if isinstance(m, ActivationQuantizer)]
    for quantizer in quantizers:
        quantizer.observer = counter  # type: ignore[assignment]
    try:
        yield
    finally:
        for quantizer in quantizers:
            quantizer.observer = None


class _Counter(TorchDispatchMode):
    """Counts what operations make and what of it is alive, for the unit that runs."""

    vectors = None

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sizes: dict[str, UnitSize] = {"": UnitSize()}
        self.now, self.before, self.before_product = "", 0, 0
        self.holders = Counter[int]()  # tensors that hold each storage
        self.bytes: dict[int, int] = {}
        self.given = set[int]()

    def alive(self) -> int:
        return sum(self.bytes.values())

    def see(self, x: Tensor, t: Tensor) -> None:
        """What a quantizer makes of x, and keeps for its gradient."""
        self.sizes[self.now].made += 3 * x.nbytes

    def enter(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.now, self.before = name, self.alive()
        size = self.sizes.setdefault(name, UnitSize())
        kept = sum(n for key, n in self.bytes.items() if key in self.given)
        size.given, size.own = max(size.given, kept), max(size.own, self.before - kept)
        size.inputs = max(size.inputs, _bytes((args, kwargs)))

    def reach(self, layer: nn.Module, args: Any) -> None:
        size = self.sizes[self.now]
        size.held = max(size.held, self.alive() - self.before)

    def place(self, layer: nn.Module, args: Any, output: Tensor) -> None:
        assert isinstance(layer, QuantLayer)
        self.sizes[self.now].places[layer.record.name] = output.numel() // len(layer.weight)

    def begin(self, product: nn.Module, args: Any, kwargs: Any) -> None:
        self.before_product = self.sizes[self.now].made

    def kept(self, product: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Of a product in blocks: four times its operands, of which three are their quantizers', and what it gives."""
        size, held = self.sizes[self.now], 4 * _bytes((args, kwargs)) + _bytes(output)
        size.made = min(size.made, self.before_product + held + BLOCK_BYTES)

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        size = self.sizes[self.now]
        size.outputs = max(size.outputs, _bytes(output))
        self.given |= {memory(x) for x in pytree.tree_leaves(output) if isinstance(x, Tensor)} & self.bytes.keys()
        self.now, self.before = "", 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        size = self.sizes[self.now]
        known = {memory(x) for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in pytree.tree_leaves(result):
            if not isinstance(x, Tensor):
                continue
            key = memory(x)
            if key in self.bytes:
                self._hold(x, key)
            elif key not in known:
                self.bytes[key] = x.untyped_storage().nbytes()
                size.made += self.bytes[key]
                self._hold(x, key)
        size.most = max(size.most, self.alive() - self.before)
        return result

    def _hold(self, x: Tensor, key: int) -> None:
        self.holders[key] += 1
        weakref.finalize(x, self._drop, key)

    def _drop(self, key: int) -> None:
        self.holders[key] -= 1
        if not self.holders[key]:
            self.bytes.pop(key, None)
            self.given.discard(key)


def _bytes(tree: Any) -> int:
    return sum(x.nbytes for x in pytree.tree_leaves(tree) if isinstance(x, Tensor))
