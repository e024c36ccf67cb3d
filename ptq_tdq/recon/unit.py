"""One reconstruction unit with its data: inputs from the quantized prefix, targets from the full-precision model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ptq_tdq.config import Config
from ptq_tdq.errors import NonFiniteError
from ptq_tdq.fused import power_sum
from ptq_tdq.modules import ActivationQuantizer, QuantLayer
from ptq_tdq.recon.streams import Store, UnitCall
from ptq_tdq.timeaxis import Clock

EVALUATION_BATCH = 64


@dataclass(frozen=True)
class Unit:
    """A module, the model's clock and the time step of each of the N samples [N]."""

    name: str
    module: nn.Module
    clock: Clock
    t: Tensor

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

    def run(self, call: UnitCall, index: Tensor | slice) -> Tensor:
        """Output of the unit for some samples, as its quantizers now stand."""
        part = call.map(lambda x: x[index])
        self.clock.set(self.t[index])
        output: Tensor = self.module(*part.args, **part.kwargs)
        return output

    def batches(self) -> Iterator[slice]:
        return (slice(i, i + EVALUATION_BATCH) for i in range(0, len(self.t), EVALUATION_BATCH))

    def outputs(self, call: UnitCall, store: Store) -> Tensor:
        """Output of the unit for all samples [N, ...]; raises :class:`NonFiniteError` naming the unit and t."""
        whole: Tensor | None = None
        with torch.no_grad():
            for batch in self.batches():
                part = self.run(call, batch)
                self.check(part, self.t[batch], f"{self.name} gives")
                if whole is None:
                    whole = store.empty((len(self.t), *part.shape[1:]), part.dtype)
                whole[batch] = part
        assert whole is not None
        return whole

    def check(self, values: Tensor, t: Tensor, what: str) -> None:
        """Raise :class:`NonFiniteError`, "<what> NaN or Inf at t = ...", unless all ``values`` [B, ...] are finite."""
        finite = torch.isfinite(values.flatten(1)).all(1)
        if not bool(finite.all()):
            raise NonFiniteError(f"{what} NaN or Inf at t = {t[~finite][0].item():g}; the run stops there.")

    def learning_loss(self, call: UnitCall, target: Tensor, power: float, config: Config, index: Tensor) -> Tensor:
        """The reconstruction loss over some samples, with gradients; products are in the config's ``compute_dtype``."""
        dtype = getattr(torch, config.compute_dtype)
        # without the cache: it would keep the first low-precision copy of a parameter while the parameter learns
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32, cache_enabled=False):
            output = self.run(call, index)
        return reconstruction_loss(output, target[index], power)

    def loss(self, call: UnitCall, target: Tensor, power: float) -> float:
        """The reconstruction loss over all samples, in float32."""
        with torch.no_grad():
            sums = [
                reconstruction_loss(self.run(call, b), target[b], power).item() * len(self.t[b]) for b in self.batches()
            ]
        return sum(sums) / len(self.t)


def reconstruction_loss(output: Tensor, target: Tensor, power: float) -> Tensor:
    """``|output - target|^power`` summed over dim 1, averaged over the rest (BRECQ)."""
    return power_sum(output - target, power) / (output.numel() // output.shape[1])
