"""The loop: every iteration depends on the state before it and its own number alone, so it can be done again."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ptq_tdq import processes
from ptq_tdq.calls import fresh, prediction
from ptq_tdq.errors import ModelError, NonFiniteError
from ptq_tdq.finetuning.config import FinetuneConfig
from ptq_tdq.finetuning.data import Batch, Data, generator_of
from ptq_tdq.finetuning.graph import Graphs
from ptq_tdq.finetuning.student import Student
from ptq_tdq.intervals.dynamic import forms
from ptq_tdq.recon import RunDirectory
from ptq_tdq.recon.unit import backward

STATE = "finetune", 0  # under which a run directory keeps it


@dataclass(frozen=True)
class IterationReport:
    """A finished iteration of ``total``: its loss, and the seconds that one takes on average since the run began."""

    iteration: int
    total: int
    loss: float
    seconds: float


class Training:
    """A student, its optimizer and the averages of what it learns."""

    def __init__(self, student: Student, teacher: nn.Module, data: Data, config: FinetuneConfig) -> None:
        self.student, self.teacher, self.data, self.config = student, teacher, data, config
        self.size = config.batch_size // (processes.count() * config.accumulation)  # of one piece in one process
        self.learned = student.learned()
        fused = student.quantized.device.type in ("cpu", "cuda")  # all tensors in one pass
        self.optimizer = torch.optim.AdamW(student.groups(config), fused=fused)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        processes.begin_alike(p.detach() for p in self.learned.values())
        self.averages = [p.detach().clone() for p in self.learned.values()]
        self.losses: list[float] = []
        self._graphs = Graphs(self._descend, list(self.learned.values())) if config.cuda_graph else None
        data.remember(self._wanted)

    def run(self, kept: RunDirectory | None, on_iteration: Callable[[IterationReport], None]) -> None:
        """Learn from the iteration that the state in ``kept`` has reached; leaves the averages in the student.

        Raises :class:`NonFiniteError` naming the iteration and the layer.
        """
        if kept is not None:
            self._load(kept)
        first, began = len(self.losses), time.perf_counter()
        for iteration in range(first, self.config.iterations):
            loss = self._iterate(iteration)
            done = iteration + 1
            seconds = (time.perf_counter() - began) / (done - first)
            on_iteration(IterationReport(done, self.config.iterations, loss, seconds))
            due = done % self.config.checkpoint_every == 0 or done == self.config.iterations
            if kept is not None and due:
                kept.write(*STATE, self._state(), (self.losses[0], loss))
        with torch.no_grad():
            for parameter, average in zip(self.learned.values(), self.averages, strict=True):
                parameter.copy_(average)

    def judge(self) -> float:
        """The loss on the samples that only judge, without penalties."""
        total, rows = 0.0, 0
        with self.student.judged():
            for batch in self.data.judges():
                predicted, _ = self.student(**fresh(batch.arguments))
                total += float(_distance(predicted, self._target(batch))) * batch.rows
                rows += batch.rows
        if not math.isfinite(total):
            raise NonFiniteError("The fine-tuned model gives NaN or Inf; lower the learning rates.")
        return total / rows

    def _iterate(self, iteration: int) -> float:
        config = self.config
        factor = _factor(iteration, config)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        self.student.freeze(iteration >= config.freeze_from * config.iterations)
        torch.manual_seed(generator_of(f"noise of process {processes.rank()}", config.seed, iteration).initial_seed())
        batches = self._draw(iteration)
        self.optimizer.zero_grad()
        loss = processes.total(self._descend_all(batches))
        if not bool(torch.isfinite(loss)):
            raise NonFiniteError(self._why(iteration, batches))
        processes.add_gradients(list(self.learned.values()))
        self.optimizer.step()
        decay = min(config.ema, (1 + iteration) / (10 + iteration))
        torch._foreach_lerp_(self.averages, [p.detach() for p in self.learned.values()], 1 - decay)
        self.losses.append(float(loss))
        return self.losses[-1]

    def _draw(self, iteration: int) -> list[Batch]:
        """What this process learns from in an iteration, in pieces."""
        seed, pieces = self.config.seed, self.config.accumulation
        numbers = self.data.order(iteration, self.config.batch_size, seed)
        noise = generator_of("data", seed, iteration).initial_seed()
        starts = (self.size * (processes.rank() * pieces + piece) for piece in range(pieces))
        return [
            batch
            for start in starts
            for batch in self.data.draw(numbers, slice(start, start + self.size), torch.Generator().manual_seed(noise))
        ]

    def _descend_all(self, batches: Sequence[Batch]) -> Tensor:
        """Add up the gradients of this process's share of the loss, which is returned."""
        total = torch.zeros((), device=self.student.quantized.device)
        for batch in batches:
            total += self._descend(batch) if self._graphs is None else self._graphs(batch, self.student.frozen)
        return total

    def _descend(self, batch: Batch) -> Tensor:
        with torch.enable_grad():
            predicted, penalty = self.student(**fresh(batch.arguments))
            if not predicted.requires_grad:
                raise ModelError(
                    "The model's prediction has no gradients to learn from, as where its forward runs under "
                    "torch.no_grad; take that out of the model and put it around the calls."
                )
            loss = (_distance(predicted, self._target(batch)) + penalty) * (batch.rows / self.config.batch_size)
            quantized = self.student.quantized
            t = quantized.axis.t(batch.arguments[quantized.axis.argument])
            backward(loss, None if quantized.one_step else t)
        found: Tensor = loss.detach()
        return found

    def _target(self, batch: Batch) -> Tensor:
        return self._wanted(**fresh(batch.arguments)) if batch.target is None else batch.target

    @torch.no_grad()
    def _wanted(self, **arguments: Any) -> Tensor:
        return prediction(self.teacher(**arguments)).float()

    def _why(self, iteration: int, batches: Sequence[Batch]) -> str:
        layers = filter(None, (self.student.first_to_overflow(batch.arguments) for batch in batches))
        where = next((f"{layer} overflows or gives NaN" for layer in layers), "the loss is NaN or Inf")
        return f"At iteration {iteration + 1} {where}; lower the learning rates (weight_lr, interval_lr, module_lr)."

    def _state(self) -> dict[str, Tensor]:
        """All that the next iteration depends on; losses are NaN where there are none yet."""
        losses = self.losses + [math.nan] * (self.config.iterations - len(self.losses))
        state = {"losses": torch.tensor(losses, dtype=torch.float64)}
        for (name, parameter), average in zip(self.learned.items(), self.averages, strict=True):
            learned = parameter.detach()
            begun = {"exp_avg": torch.zeros_like(learned), "exp_avg_sq": torch.zeros_like(learned)}  # as AdamW begins
            kept = {"learned": learned, "average": average, "step": torch.zeros(()), **begun}
            state |= {f"{key}.{name}": value for key, value in (kept | self.optimizer.state[parameter]).items()}
        return state

    def _load(self, run: RunDirectory) -> None:
        found = run.read(*STATE, forms(self._state()), _sound)
        if found is None:
            return
        state, _ = found
        self.losses = state["losses"][~state["losses"].isnan()].tolist()
        for (name, parameter), average in zip(self.learned.items(), self.averages, strict=True):
            with torch.no_grad():
                parameter.copy_(state[f"learned.{name}"])
                average.copy_(state[f"average.{name}"])
            keys = "step", "exp_avg", "exp_avg_sq"
            self.optimizer.state[parameter] = {key: state[f"{key}.{name}"].to(parameter.device) for key in keys}


def _distance(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean squared error; a learned variance behind what is predicted does not count."""
    return (predicted[:, : target.shape[1]] - target).square().mean()


def _factor(iteration: int, config: FinetuneConfig) -> float:
    """Of the learning rates at an iteration."""
    warm = min(1.0, (iteration + 1) / config.warmup) if config.warmup else 1.0
    if config.schedule == "constant":
        return warm
    return warm * 0.5 * (1 + math.cos(math.pi * iteration / config.iterations))


def _sound(state: dict[str, Tensor]) -> bool:
    """Whether a state can be that of a run: all is finite, and as many steps were made as there are losses."""
    losses = state["losses"]
    done = int((~losses.isnan()).sum())
    rest = [value for key, value in state.items() if key != "losses"]
    steps = [float(value) for key, value in state.items() if key.startswith("step.")]
    squares = [value for key, value in state.items() if key.startswith("exp_avg_sq.")]
    return (
        all(bool(value.isfinite().all()) for value in (losses[:done], *rest))
        and max(steps) == done
        and min(steps) >= 0
        and all(bool((value >= 0).all()) for value in squares)
    )


def segments(losses: Sequence[float], count: int = 100) -> list[dict[str, Any]]:
    """Mean losses over at most ``count`` runs of iterations, each with the last one's number."""
    length = -(-len(losses) // count)
    parts = [(i + len(part), part) for i in range(0, len(losses), length) if (part := losses[i : i + length])]
    return [{"iteration": last, "loss": sum(part) / len(part)} for last, part in parts]
