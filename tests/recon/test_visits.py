"""Rounding a unit whose runs wait at its layers gives what runs from the beginning, one for each layer, give."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from unit_calls import call_of

from ptq_tdq import preset
from ptq_tdq.modules import QuantLayer
from ptq_tdq.recon import weights
from ptq_tdq.recon.streams import Coroutine
from ptq_tdq.recon.unit import Unit
from ptq_tdq.records import LayerRecord, QuantizerRecord

N, MOST, WIDTH = 8, 3, 6  # the last batch is smaller
CONFIG = preset("default", scheme="W4A8")


def linear(name: str) -> QuantLayer:
    record = LayerRecord(name, "linear", "a", (0, WIDTH), 4, (QuantizerRecord(name, 8, "static", "mse"),))
    return QuantLayer(nn.Linear(WIDTH, WIDTH).requires_grad_(False), record)


class Block(nn.Module):
    """Layers in a row, two of which have one input, and one that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = map(linear, "abcd")

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.a(x).tanh()
        return self.d(self.d((self.b(y) + self.c(y)).tanh())) + x


class Otherwise(Block):
    """Layers in the other order than their names."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.a(self.b(self.c(self.d(x).tanh()).tanh()).tanh())
        return y


class Routed(Block):
    """Batches go by different layers, in different orders."""

    def forward(self, x: Tensor) -> Tensor:
        first, second = (self.a, self.b) if bool(x.sum() > 0) else (self.c, self.a)
        y: Tensor = self.d(second(first(x).tanh()))
        return y


class Keeping(Block):
    """It keeps something in itself while it runs."""

    def forward(self, x: Tensor) -> Tensor:
        self.kept = x.square()
        y = self.b(self.a(x).tanh()) * self.kept
        z: Tensor = self.d(self.c(y))
        return z


class Spare(Keeping):
    """One of its layers is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.e = linear("e")


class Set(Block):
    """It sets torch to other things while it runs."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad(), torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            y = self.b(self.a(x)) @ torch.eye(WIDTH)
            z: Tensor = self.d(self.c(y.tanh()))
        return z.float()


def rounded(kind: type[Block], waiting: int) -> tuple[list[Tensor], list[Tensor], int]:
    """Codes, scales and shifts, and then the outputs; how often the unit has run."""
    torch.manual_seed(0)
    block, generator = kind(), torch.Generator().manual_seed(1)
    unit, runs = Unit("a", block, torch.zeros(N), most=MOST, waiting=waiting), list[int]()
    full = torch.randn(N, 5, WIDTH)
    calls = [call_of("a", x) for x in (full, full + 0.1 * torch.randn(full.shape))]
    for layer in unit.layers():
        weights.initialize(layer, CONFIG)
        layer.weights_enabled = True
    with torch.no_grad(), block.register_forward_pre_hook(lambda *_: runs.append(1)):
        outputs = weights._round(unit, calls[0], calls[1], CONFIG, generator)
    assert outputs is not None
    (part,) = unit.outputs(calls[1]).parts
    torch.testing.assert_close(outputs.parts[0].leaves, part.leaves, rtol=0, atol=0)
    states, shifts = weights._weight_state(unit)
    state = [x for of_layer in states for x in of_layer if x is not None]
    return [*state, *shifts, generator.get_state()], list(part.leaves), len(runs)


@pytest.mark.parametrize("kind", [Block, Otherwise, Routed, Keeping, Spare, Set])
def test_as_many_may_wait_as_there_is_room_for(kind: type[Block]) -> None:
    alone, some, all_of_them = (rounded(kind, waiting) for waiting in (0, 4, N))
    for found in (some, all_of_them):
        torch.testing.assert_close(found[:2], alone[:2], rtol=0, atol=0)
    assert torch.backends.cuda.flash_sdp_enabled()
    if kind is Block:
        batches, groups = 3, 3
        assert alone[2] == 1 + batches * (2 * groups + 1), "the first run tells the order; outputs at the end"
        assert all_of_them[2] == 1 + 2 * batches + 1, "two streams, and one run to see that none disturbs another"


def test_what_has_waited_is_gone_without_the_garbage_collector() -> None:
    unit = Unit("a", Block(), torch.zeros(N), most=MOST)
    calls = [call_of("a", torch.randn(N, 5, WIDTH)) for _ in range(2)]
    for layer in unit.layers():
        weights.initialize(layer, CONFIG)
    held = [weakref.ref(call) for call in calls]
    gc.collect()
    gc.disable()
    try:
        weights._round(unit, *calls, CONFIG, torch.Generator())
        del calls
        assert [call() for call in held] == [None, None]
    finally:
        gc.enable()


def test_each_side_of_a_pause_keeps_what_torch_is_set_to() -> None:
    class Mode(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            raise AssertionError("nothing is called while it listens")

    def settings() -> tuple[bool, bool, int]:
        return torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch._C._len_torch_function_stack()

    inside: list[tuple[bool, bool, int]] = []

    def run() -> None:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), Mode():
            for _ in range(3):
                inside.append(settings())
                coroutine.pause(None)

    for ended in (True, False):
        coroutine, outside = Coroutine(run), settings()
        coroutine.resume()
        assert settings() == outside
        with torch.inference_mode(False), torch.autocast("cpu", torch.float16):
            between = settings()
            coroutine.resume()
            assert settings() == between and torch.get_autocast_dtype("cpu") == torch.float16
        if ended:
            coroutine.throw()
        else:
            while not coroutine.dead:
                coroutine.resume()
        assert settings() == outside
    assert set(inside) == {(False, True, 1)}
