"""One reconstruction unit with its data: inputs from the quantized prefix, targets from the full-precision model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ptq_tdq.config import Config
from ptq_tdq.errors import NonFiniteError
from ptq_tdq.fused import power_sum
from ptq_tdq.modules import ActivationQuantizer, QuantLayer
from ptq_tdq.recon.streams import Layout, Outputs, Store, UnitCall, rows_of
from ptq_tdq.timeaxis import at

EVALUATION_BATCH = 64


@dataclass(frozen=True)
class Unit:
    """A module, the time step of each of the N samples [N], and how its outputs are laid out.

    A ``single`` one takes samples of one time step at a time.
    """

    name: str
    module: nn.Module
    t: Tensor
    layout: Layout
    single: bool = False

    def layers(self) -> list[QuantLayer]:
        return [m for m in self.module.modules() if isinstance(m, QuantLayer)]

    def quantizers(self) -> list[ActivationQuantizer]:
        return [m for m in self.module.modules() if isinstance(m, ActivationQuantizer)]

    def shifts(self) -> list[nn.Parameter]:
        """The learned corrections of the layers' biases."""
        return [layer.shift for layer in self.layers() if layer.shift is not None]

    @contextmanager
    def learning(self) -> Iterator[None]:
        """Gradients on, for the bias corrections too."""
        for shift in self.shifts():
            shift.requires_grad_(True)
        try:
            with torch.enable_grad():
                yield
        finally:
            for shift in self.shifts():
                shift.requires_grad_(False)
                shift.grad = None

    def run(self, call: UnitCall, index: Tensor | slice) -> Any:
        """Output of the unit for some samples, as its quantizers now stand."""
        args, kwargs = call.take(index)
        with at(self.t[index]):
            return self.module(*args, **kwargs)

    def batches(self) -> Iterator[slice | Tensor]:
        """All samples, some at a time."""
        if self.single:
            for t in self.t.unique():
                yield from (self.t == t).nonzero().flatten().split(EVALUATION_BATCH)
            return
        count = len(self.t)
        yield from (slice(i, min(i + EVALUATION_BATCH, count)) for i in range(0, count, EVALUATION_BATCH))

    def draw(self, size: int, generator: torch.Generator, chances: Tensor | None = None) -> Tensor:
        """``size`` random samples, all alike or with ``chances`` [N]."""
        alike = torch.ones(len(self.t)) if chances is None else chances
        if self.single:
            t = self.t[torch.multinomial(alike, 1, generator=generator)]
            alike = alike * (self.t == t)
        elif chances is None:
            return torch.randint(len(self.t), (size,), generator=generator)
        return torch.multinomial(alike, size, replacement=True, generator=generator)

    def outputs(self, call: UnitCall, store: Store) -> Outputs:
        """Outputs of the unit for all samples; raises :class:`NonFiniteError` naming the unit and t."""
        leaves: list[Any] = []
        spec: pytree.TreeSpec | None = None
        with torch.no_grad():
            for batch in self.batches():
                part, spec = pytree.tree_flatten(self.run(call, batch))
                if not leaves:
                    leaves = [
                        leaf if k is None else store.empty((len(self.t) * k, *leaf.shape[1:]), leaf.dtype)
                        for leaf, k in zip(part, self.layout, strict=True)
                    ]
                for whole, leaf, k in zip(leaves, part, self.layout, strict=True):
                    if k is not None:
                        self.check(leaf, self.t[batch], f"{self.name} gives")
                        whole[rows_of(batch, k)] = leaf
        assert spec is not None
        return Outputs(tuple(leaves), spec, self.layout)

    def check(self, values: Tensor, t: Tensor, what: str) -> None:
        """Raise :class:`NonFiniteError`, "<what> NaN or Inf at t = ...", unless all ``values`` [B, ...] are finite."""
        finite = torch.isfinite(values).reshape(len(t), -1).all(1)
        if not bool(finite.all()):
            raise NonFiniteError(f"{what} NaN or Inf at t = {t[~finite][0].item():g}; the run stops there.")

    def real_rows(self, output: Any) -> list[Tensor]:
        """The real-valued tensors with rows of one output, in the order of :meth:`Outputs.rows`."""
        leaves = pytree.tree_leaves(output)
        return [x for x, k in zip(leaves, self.layout, strict=True) if k is not None and x.is_floating_point()]

    def learning_loss(self, call: UnitCall, target: Outputs, power: float, config: Config, index: Tensor) -> Tensor:
        """The reconstruction loss over some samples, with gradients; products are in the config's ``compute_dtype``."""
        dtype = getattr(torch, config.compute_dtype)
        # without the cache: it would keep the first low-precision copy of a parameter while the parameter learns
        with torch.autocast(self.t.device.type, dtype, enabled=dtype != torch.float32, cache_enabled=False):
            output = self.run(call, index)
        return reconstruction_loss(self.real_rows(output), target.rows(index), power)

    def loss(self, call: UnitCall, target: Outputs, power: float) -> float:
        """The reconstruction loss over all samples, in float32."""
        total = 0.0
        with torch.no_grad():
            for batch in self.batches():
                output = self.real_rows(self.run(call, batch))
                total += reconstruction_loss(output, target.rows(batch), power).item() * len(self.t[batch])
        return total / len(self.t)


def reconstruction_loss(outputs: Sequence[Tensor], targets: Sequence[Tensor], power: float) -> Tensor:
    """``|output - target|^power`` summed over dim 1, averaged over the rest (BRECQ); the sum over all outputs."""
    parts = [
        power_sum(output - target, power) / max(1, output.numel() // (output.shape[1] if output.ndim > 1 else 1))
        for output, target in zip(outputs, targets, strict=True)
    ]
    return torch.stack(parts).sum()
