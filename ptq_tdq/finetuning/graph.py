"""The gradients of a batch as one CUDA graph: its thousands of small kernels are launched together, not from Python."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ptq_tdq.errors import ModelError
from ptq_tdq.finetuning.data import Batch

WARM = 3  # batches of a kind that run as they are first, in which libraries choose algorithms and take memory
Descend = Callable[[Batch], Tensor]
"""Adds to the gradients of what learns those of a batch's loss, and returns the loss."""


class Graphs:
    """``descend`` for what is ``learned``, as one graph for each kind of batch and each ``state``.

    A kind is the shapes and dtypes of the tensors and all other values; a state is whatever else changes what runs.
    """

    def __init__(self, descend: Descend, learned: Sequence[nn.Parameter]) -> None:
        self.descend, self.learned = descend, learned
        # autograd goes back on the stream where a parameter was used first, and none may leave that of a capture
        self.stream = torch.cuda.Stream(learned[0].device)
        self._seen: dict[str, int] = {}
        self._graphs: dict[str, _Graph] = {}

    def __call__(self, batch: Batch, state: Any = None) -> Tensor:
        """Raises :class:`ModelError` for a model that cannot be captured."""
        leaves, form = pytree.tree_flatten(batch)
        kind = repr((form, state, [(x.shape, x.dtype) if isinstance(x, Tensor) else x for x in leaves]))
        self._seen[kind] = self._seen.get(kind, 0) + 1
        if self._seen[kind] <= WARM:
            return self._warm(batch)
        if kind not in self._graphs:
            self._graphs[kind] = _Graph(self.descend, self.learned, batch, self.stream)
        return self._graphs[kind].run(batch)

    def _warm(self, batch: Batch) -> Tensor:
        usual = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(usual)
        with torch.cuda.stream(self.stream):
            loss = self.descend(batch)
        usual.wait_stream(self.stream)
        return loss


class _Graph:
    """What one batch did, to be done again with other values in its tensors."""

    def __init__(
        self, descend: Descend, learned: Sequence[nn.Parameter], batch: Batch, stream: torch.cuda.Stream
    ) -> None:
        self.learned = learned
        self.batch: Batch = pytree.tree_map_only(Tensor, torch.clone, batch)
        before = [p.grad for p in learned]
        for p in learned:
            p.grad = None  # so that the graph has its own, and writes them anew each time
        self.graph = torch.cuda.CUDAGraph()
        random = torch.cuda.default_generators[stream.device.index]
        spare = random.clone_state()
        try:
            with torch.cuda.graph(self.graph, stream=stream):
                self.loss = descend(self.batch)
        except RuntimeError as error:
            random.graphsafe_set_state(spare)  # else it counts as captured for good
            if isinstance(error, torch.OutOfMemoryError):
                raise
            first = error.__context__ or error  # a failed capture fails once more when it is closed
            reason = str(first).partition("\n")[0]
            raise ModelError(
                f"This model's steps cannot be captured as a CUDA graph ({reason}); leave out cuda_graph."
            ) from error
        self.gradients = [p.grad for p in learned]
        for p, gradient in zip(learned, before, strict=True):
            p.grad = gradient

    def run(self, batch: Batch) -> Tensor:
        """The loss; its tensor holds until the next run."""
        for own, given in zip(pytree.tree_leaves(self.batch), pytree.tree_leaves(batch), strict=True):
            if isinstance(own, Tensor):
                own.copy_(given)
        found = [(p, g) for p, g in zip(self.learned, self.gradients, strict=True) if g is not None]
        for p, own in found:
            if p.grad is own:  # of another batch in this iteration
                p.grad = own.clone()
        self.graph.replay()
        added = [(p.grad, own) for p, own in found if p.grad is not None]
        if added:
            torch._foreach_add_(*map(list, zip(*added, strict=True)))
        for p, own in found:
            if p.grad is None:
                p.grad = own
        return self.loss
