"""What a model is fine-tuned on: calls of its own trajectories, or noised images and latents."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ptq_tdq.calls import Calls
from ptq_tdq.timeaxis import TimeAxis

HELD_OUT = 8  # one in so many trajectories, or images, only judges
MOST_JUDGES = 256  # rows
PIECE = 32  # rows of the calls that judge
STEPS = 25  # of the time axis, at which intervals for random time steps begin


class Batch(NamedTuple):
    """Keyword arguments of one call of ``rows`` samples, and what it should predict; None: what full precision does."""

    arguments: dict[str, Any]
    target: Tensor | None
    rows: int


class Data(ABC):
    """``count`` samples to learn from, and others that judge; ``steps`` [K] are time steps where intervals begin."""

    count: int
    steps: Tensor

    @abstractmethod
    def draw(self, numbers: Tensor, part: slice, generator: torch.Generator) -> list[Batch]:
        """The ``part`` of the samples ``numbers`` [B] that one process takes, as few calls as they fit in.

        All that is random is drawn for all B samples, so each sample gets the same however many processes there are.
        """

    @abstractmethod
    def remember(self, predict: Callable[..., Tensor]) -> None:
        """Ask for all that full precision predicts beforehand, where it will be asked for the same more than once."""

    @abstractmethod
    def judges(self) -> list[Batch]:
        """Calls of samples that nothing is learned from; the same each time."""

    @property
    @abstractmethod
    def identity(self) -> str:
        """A hash of the content, and of how the scheduler noises it."""

    def order(self, iteration: int, size: int, seed: int) -> Tensor:
        """The numbers of the ``size`` samples of an iteration: one permutation after the other, by seed and epoch."""
        places = torch.arange(iteration * size, (iteration + 1) * size)
        orders = {int(epoch): _permutation(self.count, seed, int(epoch)) for epoch in (places // self.count).unique()}
        return torch.stack([orders[int(place) // self.count][int(place) % self.count] for place in places])


def _permutation(count: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(count, generator=generator_of("order", seed, epoch))


def generator_of(purpose: str, seed: int, number: int) -> torch.Generator:
    """Random numbers for one purpose alone."""
    digest = hashlib.sha256(f"fine-tuning {purpose} {seed} {number}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


class RecordedCalls(Data):
    """Rows of recorded calls; trajectories that judge give none to learn from."""

    def __init__(self, calls: Calls) -> None:
        self.calls = calls
        known = calls.trajectory.unique()
        # in a row: thinned trajectories take turns at the steps
        held = known[len(known) - max(len(known) // HELD_OUT, min(1, len(known) - 1)) :]
        judging = torch.isin(calls.trajectory, held)
        self.rows, judges = (~judging).nonzero().flatten(), judging.nonzero().flatten()
        judges = judges if len(judges) else self.rows
        self._judges = judges[:: -(-len(judges) // MOST_JUDGES)]
        self.count, self.steps = len(self.rows), calls.t.cpu().unique()
        self._targets: list[Tensor] | None = None  # of each group

    def remember(self, predict: Callable[..., Tensor]) -> None:
        spans = [torch.arange(span.start, span.stop).split(PIECE) for _, span in self.calls.spans()]
        self._targets = [torch.cat([predict(**self.calls.inputs(rows)) for rows in pieces]) for pieces in spans]

    def draw(self, numbers: Tensor, part: slice, generator: torch.Generator) -> list[Batch]:
        return self._batches(self.rows[numbers[part]])

    def judges(self) -> list[Batch]:
        count = -(-len(self._judges) // PIECE)  # pieces that span all time steps, in whose order the rows are
        return [batch for first in range(count) for batch in self._batches(self._judges[first::count])]

    @property
    def identity(self) -> str:
        return self.calls.sha256

    def _batches(self, rows: Tensor) -> list[Batch]:
        """One call for each group that the rows are of."""
        found = []
        for group, (_, span) in enumerate(self.calls.spans()):
            inner = rows[(rows >= span.start) & (rows < span.stop)]
            if len(inner):
                target = None if self._targets is None else self._targets[group][inner - span.start]
                found.append(Batch(self.calls.inputs(inner), target, len(inner)))
        return found


class NoisedSamples(Data):
    """Clean samples x0 [N, ...], images or latents, that are noised at random time steps.

    With ``alphas`` (the scheduler's cumulative products) x_t = sqrt(a_t) x0 + sqrt(1 - a_t) e; without, by flow
    matching, x_t = (1 - t / T) x0 + t / T e. ``predicts`` says what the model is trained to predict of them: "epsilon",
    "v_prediction", "sample" or "flow" (e - x0). ``names`` are the model's arguments for x_t, t and, where there are
    ``labels`` [N], for the class. With ``denoise`` off the full-precision model gives the targets.
    """

    def __init__(
        self,
        clean: Tensor,
        labels: Tensor | None,
        axis: TimeAxis,
        names: tuple[str, str, str],
        *,
        alphas: Tensor | None,
        predicts: str,
        denoise: bool,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.clean, self.labels, self.axis, self.names = clean, labels, axis, names
        self.alphas, self.predicts, self.denoise = alphas, predicts, denoise
        self.device, self.dtype = device, dtype
        numbers = torch.arange(len(clean))
        judging = numbers % HELD_OUT == HELD_OUT - 1 if len(clean) >= HELD_OUT else numbers == len(clean) - 1
        self.rows, self._judges = numbers[~judging], numbers[judging][:MOST_JUDGES]
        self.count = len(self.rows)
        self.steps = torch.linspace(0, axis.num_train_timesteps, STEPS + 1)[1:].round()

    def draw(self, numbers: Tensor, part: slice, generator: torch.Generator) -> list[Batch]:
        return [self._noised(self.rows[numbers], part, generator)]

    def remember(self, predict: Callable[..., Tensor]) -> None:
        """Nothing: each call has noise of its own."""

    def judges(self) -> list[Batch]:
        rows = self._judges if len(self._judges) else self.rows[:MOST_JUDGES]
        return [
            self._noised(piece, slice(None), generator_of("judges", 0, i)) for i, piece in enumerate(rows.split(PIECE))
        ]

    @property
    def identity(self) -> str:
        digest = hashlib.sha256(self.predicts.encode())
        for tensor in (self.clean, self.labels, self.alphas):
            if tensor is not None:
                digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def _noised(self, rows: Tensor, part: slice, generator: torch.Generator) -> Batch:
        noise = torch.randn(len(rows), *self.clean.shape[1:], generator=generator)[part]
        share = torch.rand(len(rows), generator=generator)[part]
        x0, beside, total = self.clean[rows[part]], (-1, *(1,) * (self.clean.ndim - 1)), self.axis.num_train_timesteps
        if self.alphas is None:
            t = share * total
            x, target = x0 + share.view(beside) * (noise - x0), noise - x0
        else:
            t = (share * len(self.alphas)).floor().clamp(max=len(self.alphas) - 1)
            a = self.alphas[t.long()].view(beside)
            x = a.sqrt() * x0 + (1 - a).sqrt() * noise
            v = a.sqrt() * noise - (1 - a).sqrt() * x0
            target = {"epsilon": noise, "v_prediction": v, "sample": x0}[self.predicts]
        main, time, label = self.names
        arguments = {main: x.to(self.dtype), time: self.axis.value(t)}
        if self.labels is not None:
            arguments[label] = self.labels[rows[part]]
        there = {name: value.to(self.device) for name, value in arguments.items()}
        return Batch(there, target.to(self.device) if self.denoise else None, len(x0))
