"""How fast this machine is: in each unit of a model, and in what closed-form rounding is made of. All is measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ptq_tdq.ambient import products_in, undisturbed
from ptq_tdq.calls import Calls
from ptq_tdq.config import Config
from ptq_tdq.gptq import gptq, solve_order
from ptq_tdq.hooks import hooked
from ptq_tdq.intervals import Observed, source_class
from ptq_tdq.intervals.auto import FOLLOWING, Auto
from ptq_tdq.intervals.static import BinnedIntervals
from ptq_tdq.modules import ActivationQuantizer, QuantLayer
from ptq_tdq.modules.layers import layer_input
from ptq_tdq.observe import Observer
from ptq_tdq.quantized_model import QuantizedModel
from ptq_tdq.recon.moments import Inputs
from ptq_tdq.recon.size import UnitSize, at_once
from ptq_tdq.recon.unit import reconstruction_loss
from ptq_tdq.recon.windows import picker
from ptq_tdq.scheme import QType
from ptq_tdq.search import row_qparams
from ptq_tdq.wrap import switched

SEVERAL = 16  # samples that are timed at once, at most
LONG = 0.3  # seconds of a call that is timed; a longer one has one sample and is timed once


@dataclass
class Pace:
    """Seconds of one unit for one sample: as it is, behind quantizers, and for a step of learning with gradients.

    ``reach`` is how much of the unit comes before the inputs of its layers, each input on its own: 0.5 for one layer in
    the middle. ``quantizers`` is how many there are of its activations.
    """

    plain: float = 0.0
    quantized: float = 0.0
    learned: float = 0.0
    reach: float = 0.0
    quantizers: int = 0


@undisturbed()
def unit_paces(
    quantized: QuantizedModel, call: Calls, sizes: Mapping[str, UnitSize], config: Config
) -> dict[str, Pace]:
    """The pace of each unit, in calls like ``call`` in which each unit runs several times."""
    clock = _Clock(config)
    taken = seconds(partial(_run, quantized, call, 1), 1)
    most = min([SEVERAL, *(at_once(size) for size in sizes.values())])
    clock.count, clock.times = max(1, min(most, int(LONG / taken))), 1 if taken > LONG else 2
    with ExitStack() as stack:
        for name in quantized.units():
            stack.enter_context(clock.watching(name, quantized.model.get_submodule(name)))
        _run(quantized, call, clock.count)
    return clock.paces


def _run(quantized: QuantizedModel, call: Calls, count: int) -> None:
    with torch.no_grad():
        quantized(**call.inputs(torch.zeros(count, dtype=torch.int64)))


class _Clock:
    """Times units as they are called."""

    def __init__(self, config: Config) -> None:
        self.config, self.count, self.times = config, 1, 1
        self.paces: dict[str, Pace] = {}

    @contextmanager
    def watching(self, name: str, unit: nn.Module) -> Iterator[None]:
        forward = unit.forward

        def timed(*args: Any, **kwargs: Any) -> Any:
            run = partial(forward, *args, **kwargs)
            if name not in self.paces:
                self.paces[name] = self.pace(unit, run)
            return run()

        unit.forward = timed
        try:
            yield
        finally:
            del unit.forward

    def pace(self, unit: nn.Module, run: Callable[[], Any]) -> Pace:
        reach, plain = _reach(unit, run), seconds(run, self.times)
        with quantizing(unit) as quantizers:
            behind, learned = (seconds(of, self.times) for of in (run, partial(self.learn, unit, run)))
        return Pace(plain / self.count, behind / self.count, learned / self.count, reach, quantizers)

    def learn(self, unit: nn.Module, run: Callable[[], Any]) -> None:
        dtype, power = getattr(torch, self.config.learning.compute_dtype), self.config.activations.loss_power
        with torch.enable_grad():
            with products_in(dtype, unit.parameters(), _device(unit)):
                outputs = [x for x in pytree.tree_leaves(run()) if isinstance(x, Tensor) and x.requires_grad]
            if outputs:
                reconstruction_loss(outputs, [torch.ones_like(x) for x in outputs], power).backward()


def _reach(unit: nn.Module, run: Callable[[], Any]) -> float:
    """The sum of the parts of a run that come before each tensor which layers are given."""
    inputs, found = list[Tensor | None](), list[float]()

    def on_call(layer: nn.Module, args: Any, kwargs: Any) -> None:
        x = layer_input(args, kwargs)
        if not inputs or inputs[-1] is not x:
            inputs.append(x)
            found.append(time.process_time())

    layers = [module for module in unit.modules() if isinstance(module, QuantLayer)]
    with hooked(layer.register_forward_pre_hook(on_call, with_kwargs=True) for layer in layers):
        began = time.process_time()
        run()
        taken = time.process_time() - began
    return sum(now - began for now in found) / max(taken, 1e-9)


@contextmanager
def quantizing(unit: nn.Module) -> Iterator[int]:
    """While open, the unit's activations pass through quantizers with an interval that is learned; their number."""
    quantizers = [module for module in unit.modules() if isinstance(module, ActivationQuantizer)]
    for quantizer in quantizers:
        middle = torch.tensor([quantizer.qtype.qmax // 2])
        quantizer.source = BinnedIntervals(torch.ones(1), middle, 1, "log").to(_device(unit))
    try:
        with switched(unit, weights=False, activations=True):
            yield len(quantizers)
    finally:
        for quantizer in quantizers:
            quantizer.source = None


def _device(unit: nn.Module) -> torch.device:
    return next((x.device for x in unit.parameters()), torch.device("cpu"))


@dataclass(frozen=True)
class Rates:
    """Seconds of what closed-form rounding does: for an operation of a product in float32 and in float64; to search the
    interval of a weight, for a number; to pick and keep a number of a layer's inputs, of a convolution and of a linear
    layer; to round one weight with one scale. And ``start`` those of one quantizer's interval source at its start.
    """

    product: float
    double: float
    search: float
    pick: float
    pick_linear: float
    rounding: float
    start: float

    @classmethod
    def measured(cls, config: Config) -> Rates:
        size, columns, generator = 768, 256, torch.Generator()
        a = torch.randn(size, size)
        double, weight, scale = a.double(), torch.randn(320, columns), torch.ones(5, 320, columns)
        zero_point, solve = torch.zeros(320, columns), solve_order(torch.eye(columns, dtype=torch.float64))
        return cls(
            product=seconds(lambda: a @ a) / (2 * size**3),
            double=seconds(lambda: double @ double) / (2 * size**3),
            search=seconds(lambda: row_qparams(weight[:64], QType(4)), 2) / weight[:64].numel(),
            pick=_picked(nn.Conv2d(64, 1, 3, padding=1), torch.randn(1, 64, 16, 16), generator),
            pick_linear=_picked(nn.Linear(512, 1), torch.randn(1, 256, 512), generator),
            rounding=seconds(lambda: gptq(weight, solve, scale, zero_point, QType(4)), 2) / scale.numel(),
            start=seconds(partial(_start, config), 1),
        )


def _start(config: Config) -> None:
    """Start a source of the method, if it is one of t, from what might be seen at a few steps."""
    method, steps = FOLLOWING if config.method == Auto.pattern else config.method, torch.linspace(0, 1000, 8)
    observer, x = Observer("", steps), torch.randn(8, 1024) * (1 + steps[:, None] / 1000)
    observer.see(x, steps)
    observer.start_counting()
    observer.see(x, steps)
    if source_class(method).timed:
        seen = Observed(
            1000, steps, observer.histogram(), QType(8), config.activations.activation_range, choices=config.intervals
        )
        source_class(method).build(method, seen)


def _picked(layer: nn.Module, x: Tensor, generator: torch.Generator) -> float:
    """Seconds for each number of a row, of both streams."""
    rows = picker(layer, x, 1 << 20, generator)(x)[:, 0].contiguous()

    def look() -> None:
        pick, found = picker(layer, x, 1 << 20, generator), Inputs(1, rows.shape[1], x.device)
        seen, meant = pick(x)[:, 0].contiguous(), pick(x)[:, 0]
        found.add(seen, (meant.double() - seen).sum(1, keepdim=True).float())
        found.close(centred=True)

    return seconds(look) / rows.numel()


def seconds(run: Callable[[], object], times: int = 3) -> float:
    """Of this process alone, whatever else the machine does; the fastest time."""
    found = []
    for _ in range(times):
        began = time.process_time()
        run()
        found.append(time.process_time() - began)
    return max(min(found), 1e-9) / torch.get_num_threads()
