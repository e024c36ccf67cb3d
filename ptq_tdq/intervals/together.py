"""Many small networks of t as one: while a model learns, their layers are batched products."""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.func import functional_call, vmap

from ptq_tdq import timeaxis

if TYPE_CHECKING:
    from ptq_tdq.intervals.mlp import ModuleInterval


class Together:
    """Modules of one form. A call's t is given to all of them when it first asks one; for one thread."""

    def __init__(self, sources: list[ModuleInterval]) -> None:
        self.places = {id(source): place for place, source in enumerate(sources)}
        self.template = deepcopy(sources[0])
        self.parameters = [dict(source.named_parameters()) for source in sources]
        buffers = [dict(source.named_buffers()) for source in sources]
        self.buffers = {name: torch.stack([own[name] for own in buffers]) for name in buffers[0]}
        self._t: Tensor | None = None
        self._found: tuple[Tensor, Tensor]

    def of(self, source: ModuleInterval, t: Tensor) -> tuple[Tensor, Tensor] | None:
        """What ``source`` gives at ``t`` [B], where that is the t of the call that runs."""
        now = timeaxis.of_call()
        if now is None or len(now) not in (1, len(t)):
            return None
        if now is not self._t:
            self.template.train(source.training)
            names = self.parameters[0]
            stacked = {name: torch.stack([own[name] for own in self.parameters]) for name in names}
            self._t, self._found = now, vmap(partial(self._one, now), randomness="different")(stacked, self.buffers)
        scale, zero_point = (found[self.places[id(source)]].expand(len(t)) for found in self._found)
        return scale, zero_point

    def _one(self, t: Tensor, parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = functional_call(self.template, (parameters, buffers), (t, t[:, None]))
        return found


def join(sources: Iterable[ModuleInterval]) -> None:
    """Let those of one form run together from now on."""
    forms: dict[str, list[ModuleInterval]] = {}
    for source in sources:
        forms.setdefault(source.form, []).append(source)
    for alike in forms.values():
        if len(alike) > 1:
            joined = Together(alike)
            for source in alike:
                source.together = joined
