"""Norms of tokens and what modulates them, x (1 + scale) + shift, with the gate of a branch of a transformer block.

A block's norms make modulations [B or 1, K, C] of its conditions (t, labels, texts): K scales, shifts and gates.
Linears of weights in integers make them inside the block's plan.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from diffusers.models.embeddings import CombinedTimestepLabelEmbeddings
from diffusers.models.normalization import FP32LayerNorm, RMSNorm
from torch import Tensor, nn
from torch.nn import functional

from ptq_tdq.runtime.kernels import TokenNorm
from ptq_tdq.runtime.layer import IntegerLinear, WeightOnlyLayer
from ptq_tdq.runtime.native import FEW_ROWS
from ptq_tdq.runtime.passes import Modulation, Place, Plan
from ptq_tdq.runtime.step import kept


class Conditions(NamedTuple):
    """What a block is given beside its ``batch`` of tokens."""

    batch: int
    timestep: Any
    class_labels: Any
    added: Any


class Rows(NamedTuple):
    """Which rows of which of a block's modulations [B or 1, K, C] a branch has."""

    modulation: int
    scale: int
    shift: int
    gate: int | None = None

    def of(self, places: Sequence[Place]) -> Modulation:
        of = places[self.modulation]
        return Modulation(
            of.chunk(self.scale), of.chunk(self.shift), None if self.gate is None else of.chunk(self.gate)
        )


class Input(NamedTuple):
    """What the linears of a branch read, whether that is rotated, and the gate that the branch ends with."""

    x: Place
    rotated: bool = False
    gate: Place | None = None


@dataclass(frozen=True)
class Branch:
    """The norm that a branch of a block begins with, and what modulates it."""

    norm: TokenNorm | None
    rows: Rows | None = None

    def plan(self, plan: Plan, x: Place, modulations: Sequence[Place], linears: Sequence[IntegerLinear]) -> Input:
        """x [B, N, C] as the linears take it: normalised, and rotated where they all do, once for all."""
        if self.norm is None:
            return Input(x)
        rotate = all(linear.record.rotated for linear in linears)
        modulation = self.rows.of(modulations) if self.rows else None
        y = plan.normalize(x, self.norm, modulation, rotate=rotate)
        return Input(y, rotate, modulation.gate if modulation else None)


class Modulations:
    """A block without modulations."""

    def __init__(self, block: Any) -> None:
        self.block = block

    def given(self, call: Conditions) -> list[Tensor]:
        """What a call gives to the plan: modulations [B or 1, K, C], or conditions [B or 1, E] to make them of."""
        return []

    def plan(self, plan: Plan, given: Sequence[Place]) -> list[Place]:
        """The modulations from what is given."""
        return list(given)


class _Single(Modulations):
    """One projection of t for all blocks, to which each adds a table (PixArt-alpha, arXiv 2310.00426)."""

    def given(self, call: Conditions) -> list[Tensor]:
        return [self.block.scale_shift_table[None] + call.timestep.reshape(call.batch, 6, -1)]


class _Projected(Modulations):
    """A linear of each of the block's norms makes ``rows`` of them, behind a SiLU."""

    rows = 2

    def __init__(self, block: Any) -> None:
        super().__init__(block)
        norms = (norm for norm in (block.norm1, block.norm2, block.norm3) if hasattr(norm, "linear"))
        self.linears: list[Any] = [norm.linear for norm in norms]
        self.planned = all(map(in_plans, self.linears))

    def conditions(self, call: Conditions) -> list[Tensor]:
        """One for each linear, [B, E]."""
        raise NotImplementedError

    def given(self, call: Conditions) -> list[Tensor]:
        conditions = self.conditions(call)
        if self.planned and all(map(are_few, conditions)):
            return conditions
        return [self._computed(*pair) for pair in zip(self.linears, conditions, strict=True)]

    def _computed(self, linear: nn.Module, condition: Tensor) -> Tensor:
        y: Tensor = linear(functional.silu(condition))
        return y.view(-1, self.rows, y.shape[-1] // self.rows)

    def plan(self, plan: Plan, given: Sequence[Place]) -> list[Place]:
        if any(len(place.shape) == 3 for place in given):  # computed
            return list(given)
        return [self._planned(plan, *pair) for pair in zip(self.linears, given, strict=True)]

    def _planned(self, plan: Plan, linear: WeightOnlyLayer, condition: Place) -> Place:
        y = plan.weight_only(linear, condition, silu=True)
        return y._replace(shape=(y.shape[0], self.rows, y.shape[1] // self.rows))


class _OfEmbedding(_Projected):
    """AdaLayerNorm: an embedding of the number of the step, one for all samples."""

    def conditions(self, call: Conditions) -> list[Tensor]:
        norms = [norm for norm in (self.block.norm1, self.block.norm2) if norm is not None]
        return [norm.emb(call.timestep).view(1, -1) for norm in norms]


class _OfText(_Projected):
    """AdaLayerNormContinuous: of a pooled text."""

    def conditions(self, call: Conditions) -> list[Tensor]:
        return [call.added["pooled_text_emb"]] * len(self.linears)


class _OfTimeAndLabel(_Projected):
    """AdaLayerNormZero: six rows for a block, of t and a label (DiT, arXiv 2212.09748)."""

    rows = 6

    def __init__(self, block: Any) -> None:
        super().__init__(block)
        self.embedding: Any = block.norm1.emb
        self.embedder: Any = getattr(self.embedding, "timestep_embedder", None)
        self.embeds = self.planned and self._is_of_two_linears() and self._are_in_plans()

    def _is_of_two_linears(self) -> bool:
        """Whether the embedding of t is linear, SiLU, linear, to which that of a label is added."""
        if type(self.embedding) is not CombinedTimestepLabelEmbeddings or not isinstance(self.embedder.act, nn.SiLU):
            return False
        return self.embedder.cond_proj is None and self.embedder.post_act is None

    def _are_in_plans(self) -> bool:
        return in_plans(self.embedder.linear_1) and in_plans(self.embedder.linear_2)

    def conditions(self, call: Conditions) -> list[Tensor]:
        return [self.embedding(call.timestep, call.class_labels, hidden_dtype=torch.float32)]

    def given(self, call: Conditions) -> list[Tensor]:
        if not self.embeds:
            return super().given(call)
        t, label = sinusoids(self.embedding.time_proj, call.timestep), self.embedding.class_embedder(call.class_labels)
        return [t, label] if are_few(t) and label.shape[:-1] == t.shape[:-1] else super().given(call)

    def plan(self, plan: Plan, given: Sequence[Place]) -> list[Place]:
        if len(given) == 1:
            return super().plan(plan, given)
        (t, label), (linear,) = given, self.linears
        embedded = plan.weight_only(
            self.embedder.linear_2, plan.weight_only(self.embedder.linear_1, t), silu=True, onto=label
        )
        return [self._planned(plan, linear, embedded)]


def in_plans(linear: nn.Module) -> bool:
    """Whether a linear can be a pass of plans: with weights of integers."""
    return type(linear) is WeightOnlyLayer and linear.codes.ndim == 2 and linear.codes.dtype == torch.int8


def are_few(conditions: Tensor) -> bool:
    """Whether conditions [B, E] are so few that such a pass is the fastest form."""
    return conditions.ndim == 2 and conditions.shape[0] <= FEW_ROWS


def sinusoids(projection: Any, timestep: Tensor) -> Tensor:
    """What ``Timesteps`` makes of t, computed once in a call for all modules that ask for the same."""
    how = projection.num_channels, projection.flip_sin_to_cos, projection.downscale_freq_shift, projection.scale
    last, y = kept().get(how, (None, None))
    if last is not timestep:
        y = projection(timestep)
        kept()[how] = timestep, y
    assert isinstance(y, Tensor)
    return y


_SHAPES = {nn.LayerNorm: "normalized_shape", FP32LayerNorm: "normalized_shape", RMSNorm: "dim"}


def token_norm_of(module: Any) -> TokenNorm | None:
    """The norm of the last dimension as data, or None for another kind of norm."""
    shape = getattr(module, _SHAPES.get(type(module), ""), ())
    if len(shape) != 1:
        return None
    weight, bias = (None if p is None else p.detach().float().contiguous() for p in (module.weight, module.bias))
    return TokenNorm(weight, bias, module.eps, centered=type(module) is not RMSNorm)


def _branch(module: Any, rows: Rows | None = None) -> Branch | None:
    """Of a norm, or of an adaptive one's."""
    norm = token_norm_of(getattr(module, "norm", module))
    return None if norm is None else Branch(norm, rows)


Branches = tuple[Branch | None, Branch | None, Branch | None]
_ATTENTION, _FEED_FORWARD = Rows(0, scale=1, shift=0, gate=2), Rows(0, scale=4, shift=3, gate=5)  # of six rows

BRANCHES: dict[str, Callable[[Any], Branches]] = {
    "layer_norm": lambda b: (_branch(b.norm1), _branch(b.norm2), _branch(b.norm3)),
    "ada_norm": lambda b: (_branch(b.norm1, Rows(0, 0, 1)), _branch(b.norm2, Rows(1, 0, 1)), _branch(b.norm3)),
    "ada_norm_zero": lambda b: (_branch(b.norm1, _ATTENTION), _branch(b.norm2), _branch(b.norm3, _FEED_FORWARD)),
    "ada_norm_single": lambda b: (_branch(b.norm1, _ATTENTION), Branch(None), _branch(b.norm2, _FEED_FORWARD)),
    "ada_norm_continuous": lambda b: (
        _branch(b.norm1, Rows(0, 0, 1)),
        _branch(b.norm2, Rows(1, 0, 1)),
        _branch(b.norm3, Rows(-1, 0, 1)),
    ),
}
"""What the two attentions and the feed-forward network of a BasicTransformerBlock begin with, by its ``norm_type``."""

MODULATIONS: dict[str, type[Modulations]] = {
    "layer_norm": Modulations,
    "ada_norm": _OfEmbedding,
    "ada_norm_zero": _OfTimeAndLabel,
    "ada_norm_single": _Single,
    "ada_norm_continuous": _OfText,
}
