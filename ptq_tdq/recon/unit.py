"""One reconstruction unit with its data: inputs from the quantized prefix, targets from the full-precision model."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, reduce
from operator import add
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ptq_tdq import processes
from ptq_tdq.ambient import products_in
from ptq_tdq.config import Config
from ptq_tdq.errors import ModelError, NonFiniteError
from ptq_tdq.fused import power_sum
from ptq_tdq.hooks import hooked
from ptq_tdq.modules import ActivationQuantizer, QuantLayer
from ptq_tdq.recon.parts import Part, Parts, Store
from ptq_tdq.recon.streams import UnitCall
from ptq_tdq.timeaxis import at

MOST = 64  # samples that run at once

T = TypeVar("T")


@dataclass(frozen=True)
class Unit:
    """A module, and the time step of each of the N samples [N] (on the CPU).

    ``spans`` are the samples that may run together, by default all. A ``single`` unit takes samples of one time step at
    a time. ``held_out`` [N] marks the samples of the trajectories that only judge what is learned; ``among`` [N] those
    that are drawn, run and counted in a loss, by default all. ``most`` samples run at once, and runs of ``waiting``
    samples in each stream may wait at a layer of the unit. ``mine`` are the samples whose streams this process has, by
    default all: it runs those, and what it gives is about those of all processes. ``store`` keeps its outputs.
    """

    name: str
    module: nn.Module
    t: Tensor
    spans: tuple[slice, ...] = ()
    single: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    held_out: Tensor | None = None
    among: Tensor | None = None
    most: int = MOST
    waiting: int = sys.maxsize
    mine: slice | None = None
    store: Store = field(default_factory=lambda: Store(on_disk=False))
    _found: dict[str, bool] = field(default_factory=dict)  # about the module

    @cached_property
    def cells(self) -> list[Tensor]:
        """The numbers of samples that may run together."""
        numbers = torch.arange(len(self.t))
        spans = [numbers[span] for span in self.spans or (slice(None),)]
        if self.among is not None:
            spans = [span[self.among[span]] for span in spans]
        cells = [span[self.t[span] == t] for span in spans for t in self.t[span].unique()] if self.single else spans
        return [cell for cell in cells if len(cell)]

    def split(self) -> tuple[Unit, Unit]:
        """The unit on the samples to learn from and on those held out; on all of them where nothing is held out."""
        if self.held_out is None or not bool(self.held_out.any()):
            return self, self
        among = torch.ones_like(self.held_out) if self.among is None else self.among
        return replace(self, among=among & ~self.held_out), replace(self, among=among & self.held_out)

    def layers(self) -> list[QuantLayer]:
        return [m for m in self.module.modules() if isinstance(m, QuantLayer)]

    def quantizers(self) -> list[ActivationQuantizer]:
        return [m for m in self.module.modules() if isinstance(m, ActivationQuantizer)]

    def shifts(self) -> list[Tensor]:
        """The learned corrections of the layers' biases."""
        return [layer.shift for layer in self.layers() if layer.shift is not None]

    def set_shifts(self, values: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for shift, value in zip(self.shifts(), values, strict=True):
                shift.copy_(value)

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
        """Output of the unit for some samples of one cell, as its quantizers now stand."""
        part = call.arguments.of(index)
        args, kwargs = part[index]
        if self._found.get("checkpoints") and torch.is_grad_enabled():
            args, kwargs = pytree.tree_map(_differentiable, (args, kwargs))
        with ExitStack() as stack:
            stack.enter_context(at(self.t[index].to(part.device)))
            for kind, (enabled, dtype) in call.autocast.items():
                if enabled:  # the model's own, around the unit
                    stack.enter_context(torch.autocast(kind, dtype, cache_enabled=False))
            return self.module(*args, **kwargs)

    def here(self, index: Tensor) -> Tensor:
        """Those of some samples that this process has."""
        return index if self.mine is None else index[(index >= self.mine.start) & (index < self.mine.stop)]

    def batches(self) -> Iterator[slice | Tensor]:
        """All samples that this process has, some of one cell at a time."""
        for cell in self.cells:
            for piece in cell.split(self.most):
                if len(here := self.here(piece)):
                    yield as_slice(here)

    def turns(self, look: Callable[[Tensor], T]) -> Iterator[tuple[Tensor, Tensor, T]]:
        """The samples of each batch, those that this process has, and what ``look`` finds in one sample of their cell.

        That tells how many random numbers a batch takes, so that these are the same wherever it runs.
        """
        own = [(number, self.here(cell)) for number, cell in enumerate(self.cells)]
        found = dict(processes.gather([(number, look(some[:1])) for number, some in own if len(some)]))
        for number, cell in enumerate(self.cells):
            for piece in cell.split(self.most):
                yield piece, self.here(piece), found[number]

    def draw(self, size: int, generator: torch.Generator, chances: Tensor | None = None) -> Tensor:
        """``size`` random samples of one cell, all alike or with ``chances`` [N]."""
        cell, alike = self.cells[0], torch.ones(len(self.t)) if chances is None else chances
        if len(self.cells) > 1:
            of_cells = torch.stack([alike[cell].sum() for cell in self.cells])
            cell = self.cells[int(torch.multinomial(of_cells, 1, generator=generator))]
        if chances is None:
            return cell[torch.randint(len(cell), (size,), generator=generator)]
        return cell[torch.multinomial(chances[cell], size, replacement=True, generator=generator)]

    def outputs(self, call: UnitCall, run: Callable[[slice | Tensor], Any] | None = None) -> Parts:
        """Outputs of the unit for all samples, as its quantizers now stand; ``run`` gives those of one batch."""
        whole: dict[int, Part] = {}
        with torch.no_grad():
            for batch in self.batches():
                output = run(batch) if run else self.run(call, batch)
                part, span = call.output(output, batch), call.arguments.of(batch).samples
                if span.start not in whole:
                    whole[span.start] = part.empty(span, self.store)
                whole[span.start].put(batch, part)
        return Parts(tuple(whole[start] for start in sorted(whole)))

    def require_finite(self, outputs: Parts) -> Parts:
        """The outputs themselves; raises :class:`NonFiniteError` naming the unit and t unless all are finite."""
        for batch in self.batches():
            for leaf in outputs.real(batch):
                check_finite(leaf, self.t[batch], f"{self.name} gives")
        return outputs

    def learning_loss(self, call: UnitCall, target: Parts, power: float, config: Config, index: Tensor) -> Tensor:
        """The reconstruction loss over some samples, with gradients; products are in the config's ``compute_dtype``.

        A model in half precision computes in its own.
        """
        dtype, device = getattr(torch, config.learning.compute_dtype), call.arguments.of(index).device
        with products_in(dtype, (layer.weight for layer in self.layers()), device):
            output = self.run(call, index)
        return self._loss(call, output, target, power, index)

    def loss(self, call: UnitCall, target: Parts, power: float) -> float:
        """The reconstruction loss over all samples, in float32."""
        return self._mean(lambda batch: self._loss(call, self.run(call, batch), target, power, batch))

    def loss_of(self, outputs: Parts, target: Parts, power: float) -> float:
        """The :meth:`loss` of these outputs."""
        return self._mean(lambda batch: reconstruction_loss(outputs.real(batch), target.real(batch), power))

    def _mean(self, loss: Callable[[slice | Tensor], Tensor]) -> float:
        with torch.no_grad():
            found = [loss(batch).item() * len(self.t[batch]) for batch in self.batches()]
        return reduce(add, processes.gather(found), 0.0) / sum(map(len, self.cells))

    def losses(self, call: UnitCall, target: Parts, power: float) -> Tensor:
        """The reconstruction loss of each sample [n], in float32; its mean is that of :meth:`loss`."""
        found = []
        with torch.no_grad():
            for batch in self.batches():
                count, part = len(self.t[batch]), call.output(self.run(call, batch), batch)
                pairs = zip(part.real(slice(0, count)), target.real(batch), strict=True)
                each = [
                    reconstruction_loss([a], [b], power)
                    for output, aim in pairs
                    for a, b in zip(output.chunk(count), aim.chunk(count), strict=True)
                ]
                found.append(torch.stack(each).view(-1, count).sum(0) if each else torch.zeros(count))
        return torch.cat(processes.gather(found))

    def descend(
        self,
        call: UnitCall,
        target: Parts,
        power: float,
        config: Config,
        index: Tensor,
        optimizer: torch.optim.Optimizer,
        penalties: Sequence[Tensor] = (),
    ) -> bool:
        """One step down the learning loss of samples ``index`` and ``penalties``.

        False, without a step, where the loss does not depend on what is learned.
        """
        optimizer.zero_grad()
        with self._as_checkpoints_ask(call, index):
            self._backward(call, target, power, config, index, penalties)
        learned = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        processes.add_gradients(learned)
        if all(parameter.grad is None for parameter in learned):
            return False
        optimizer.step()
        return True

    @contextmanager
    def _as_checkpoints_ask(self, call: UnitCall, index: Tensor) -> Iterator[None]:
        """Gradients of the inputs and of all parameters too, in a module with checkpoints that have none without.

        These compute without gradients, and once more for them: torch's reentrant ones, and older ones of models' own.
        """
        if "checkpoints" not in self._found and len(own := self.here(index)):
            on: list[bool] = []
            hooks = (x.register_forward_pre_hook(lambda *_: on.append(torch.is_grad_enabled())) for x in self.layers())
            with hooked(hooks), torch.random.fork_rng([]):
                self.run(call, own[:1])
            self._found["checkpoints"] = not all(on)
        parameters = self.module.parameters() if self._found.get("checkpoints") else ()
        frozen = [p for p in parameters if p.is_floating_point() and not p.requires_grad]
        try:
            for parameter in frozen:
                parameter.requires_grad_(True)
            yield
        finally:
            for parameter in frozen:
                parameter.requires_grad_(False)
                parameter.grad = None

    def _backward(
        self, call: UnitCall, target: Parts, power: float, config: Config, index: Tensor, penalties: Sequence[Tensor]
    ) -> None:
        """Add this process's share of the gradients; none where the loss does not depend on what is learned."""
        own = self.here(index)
        pieces = own.split(self.most) if len(own) else ()
        for number, some in enumerate(pieces, 1):
            loss = self.learning_loss(call, target, power, config, some) * (len(some) / len(index))
            if not loss.requires_grad:
                return
            last = number == len(pieces)
            shares = [penalty * (len(own) / len(index)) for penalty in penalties] if last else []
            # what the pieces share, soft weights, is kept until the last one; the rest goes with its loss
            backward(sum(shares, loss), self.t[some], retain_graph=not last)

    def _loss(self, call: UnitCall, output: Any, target: Parts, power: float, index: slice | Tensor) -> Tensor:
        part = call.output(output, index)
        return reconstruction_loss(part.real(slice(0, len(self.t[index]))), target.real(index), power)


def _differentiable(leaf: Any) -> Any:
    return leaf.detach().requires_grad_() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def backward(loss: Tensor, t: Tensor | None, *, retain_graph: bool = False) -> None:
    """Gradients of the loss of a call at ``t``, at which checkpoints compute again; None where it has no single t.

    Raises :class:`ModelError` for checkpoints that ask for the gradients of what does not learn.
    """
    try:
        known = nullcontext() if t is None else at(t.to(loss.device))
        with known, torch.autograd.set_multithreading_enabled(False):  # in this thread, which knows t
            loss.backward(retain_graph=retain_graph)
    except RuntimeError as error:
        if "does not require grad" not in str(error):
            raise
        raise ModelError(
            "The model computes gradients by itself (in checkpoints of its own, say), also those of weights that do "
            "not learn; turn that off, or let it call torch.utils.checkpoint."
        ) from error


def as_slice(index: Tensor) -> slice | Tensor:
    """Ascending numbers as a slice, if they are one."""
    start, stop = int(index[0]), int(index[-1]) + 1
    return slice(start, stop) if stop - start == len(index) else index


def check_finite(values: Tensor, t: Tensor, what: str) -> None:
    """Raise :class:`NonFiniteError`, "<what> NaN or Inf at t = ...", unless all ``values`` [n, ...] are finite."""
    if not bool(torch.isfinite(values).all()):
        wrong = ~torch.isfinite(values).reshape(len(t), -1).all(1).cpu()
        half = values.dtype == torch.float16
        help = "float16 ends at 65504: calibrate the model in bfloat16 or float32" if half else "the run stops there"
        raise NonFiniteError(f"{what} NaN or Inf at t = {t[wrong][0].item():g}; {help}.")


def reconstruction_loss(outputs: Sequence[Tensor], targets: Sequence[Tensor], power: float) -> Tensor:
    """``|output - target|^power`` summed over dim 1, averaged over the rest (BRECQ); the sum over all outputs.

    0 for a unit that gives nothing of any sample, such as the embedding of a time step that is always the same.
    """
    if not outputs:
        return torch.zeros(())
    parts = [
        power_sum(output.float() - target.float(), power)
        / max(1, output.numel() // (output.shape[1] if output.ndim > 1 else 1))
        for output, target in zip(outputs, targets, strict=True)
    ]
    return torch.stack(parts).sum()
