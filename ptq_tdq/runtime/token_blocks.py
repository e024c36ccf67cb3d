"""Transformer blocks of tokens as one call of ``native.c``: norms, linears, attention and residual sums.

    x = x + gate attn(modulated(norm(x)))    for self-attention, cross-attention and the feed-forward network

Norms and what modulates them go before the quantizers of the linears that follow, gates and sums into the products.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.normalization import RMSNorm
from torch import Tensor, nn
from torch.nn import functional

from ptq_tdq.modules.products import products_of
from ptq_tdq.runtime.attention import IntegerProduct, added, steps_of
from ptq_tdq.runtime.blocks import Fused, FusedChain
from ptq_tdq.runtime.kernels import Activation, TokenNorm
from ptq_tdq.runtime.layer import IntegerLinear
from ptq_tdq.runtime.passes import Modulation, Place, Plan


class Rows(NamedTuple):
    """Which rows of which of a block's modulations [B, K, C] a branch has."""

    modulation: int
    scale: int
    shift: int
    gate: int | None = None

    def of(self, places: Sequence[Place]) -> Modulation:
        of = places[self.modulation]
        return Modulation(of.chunk(self.scale), of.chunk(self.shift), None if self.gate is None else of.chunk(self.gate))


@dataclass(frozen=True)
class Branch:
    """What a branch of a block begins with, and the gate that it ends with."""

    norm: TokenNorm | None
    rows: Rows | None = None

    def normalized(self, plan: Plan, x: Place, places: Sequence[Place], layers: Sequence[IntegerLinear]) -> _Input:
        """x [B, N, C] as the layers take it, normalised and rotated once for all."""
        if self.norm is None:
            return _Input(x, rotated=False, gate=None)
        rotate = all(layer.record.rotated for layer in layers)
        modulation = self.rows.of(places) if self.rows else None
        y = plan.normalize(x, self.norm, modulation, rotate=rotate)
        return _Input(y, rotate, modulation.gate if modulation else None)


class _Input(NamedTuple):
    """What layers read, whether it is rotated, and the gate that their branch ends with."""

    x: Place
    rotated: bool
    gate: Place | None


class Attend:
    """Attention of a block: its linears, which are all in integers, and its product."""

    def __init__(self, attention: Any, branch: Branch, product: IntegerProduct) -> None:
        self.attention, self.branch, self.product = attention, branch, product
        self.out: IntegerLinear = attention.to_out[0]

    @staticmethod
    def of(attention: Any, branch: Branch) -> Attend | None:
        """None for another form of attention, or where it stays in floating point."""
        products = products_of(attention)
        covered = (
            len(products) == 1
            and products[0].step.columns(products[0].record.inputs) is not None
            and isinstance(attention.to_out, nn.ModuleList)
            and all(map(is_one_call, (attention.to_q, attention.to_k, attention.to_v, attention.to_out[0])))
            and attention.to_q.out_features == attention.to_k.out_features == attention.to_v.out_features
            and not any((attention.group_norm, attention.spatial_norm, attention.norm_cross))
            and not any((attention.norm_q, attention.norm_k, attention.fused_projections))
            and not (attention.residual_connection or attention.rescale_output_factor != 1)
        )
        return Attend(attention, branch, products[0]) if covered else None

    def mask(self, given: Tensor | None, queries: Tensor, keys: Tensor) -> Tensor | None:
        """What is added to the scores [B, heads, N or 1, M]."""
        if given is None:
            return None
        batch, count = keys.shape[:2]
        mask = self.attention.prepare_attention_mask(given, count, batch)
        heads = self.attention.heads
        whole, _ = steps_of(added(mask.view(batch, heads, -1, mask.shape[-1])), (batch, heads, queries.shape[1], count))
        return whole

    def plan(
        self, plan: Plan, x: Place, other: Place | None, mask: Place | None, places: Sequence[Place], to: Place
    ) -> None:
        """The passes from x [B, N, C], and the ``other`` tokens [B, M, C'] that it looks at, to its sum with x."""
        attention = self.attention
        layers = (attention.to_q, attention.to_k, attention.to_v)
        y, rotated, gate = self.branch.normalized(plan, x, places, layers if other is None else layers[:1])
        q = plan.layer(layers[0], y, rotated=rotated)
        k, v = (
            plan.layer(layer, y, rotated=rotated) if other is None else plan.layer(layer, other) for layer in layers[1:]
        )
        steps = (0, 0, 0)
        if mask is not None:
            batch, heads, rows, keys = mask.shape
            steps = (heads * rows * keys, rows * keys, keys if rows > 1 else 0)
        out = plan.attend(self.product, (q, k, v), attention.heads, mask, steps)
        plan.layer(self.out, out, onto=x, gate=gate, to=to)


class FeedForward:
    """A feed-forward network of two integer linears with an activation between them."""

    def __init__(self, branch: Branch, first: IntegerLinear, second: IntegerLinear, activation: Activation) -> None:
        self.branch, self.first, self.second, self.activation = branch, first, second, activation

    @staticmethod
    def of(network: Any, branch: Branch) -> FeedForward | None:
        """None for a network of another form."""
        fused = FusedChain.of(network)
        if fused is None or len(fused.chain) != 2:
            return None
        (first, before), (second, activation) = fused.chain
        if not (is_one_call(first) and is_one_call(second)) or before is not None or activation is None:
            return None
        return FeedForward(branch, first, second, activation)  # type: ignore[arg-type]

    def plan(self, plan: Plan, x: Place, places: Sequence[Place]) -> None:
        """The passes from x [B, N, C] to its sum with the network's result, in its place."""
        y, rotated, gate = self.branch.normalized(plan, x, places, [self.first])
        hidden = plan.layer(self.first, y, rotated=rotated)
        plan.layer(self.second, hidden, self.activation, onto=x, gate=gate, to=x)


class Plans(dict[tuple[object, ...], Plan]):
    """Plans by what they were made for; a copy of the model makes its own."""

    def __deepcopy__(self, memo: dict[int, object]) -> Plans:
        return Plans()


class Conditions(NamedTuple):
    """What a block is told beside its tokens [B, N, C]."""

    batch: int
    timestep: Tensor
    class_labels: Tensor | None
    added: dict[str, Tensor] | None


class FusedTransformer(Fused):
    """BasicTransformerBlock, with any of its norms."""

    def __init__(self, block: Any, first: Attend, second: Attend | None, feed_forward: FeedForward) -> None:
        super().__init__(block)
        self.first, self.second, self.feed_forward = first, second, feed_forward
        self.attends = [attend for attend in (first, second) if attend is not None]
        self.step = first.out.step
        self.plans = Plans()

    @staticmethod
    def of(block: Any) -> FusedTransformer | None:
        branches = BRANCHES.get(block.norm_type, lambda _: None)(block)
        if branches is None or block.pos_embed is not None or hasattr(block, "fuser"):
            return None
        first = branches[0] and Attend.of(block.attn1, branches[0])
        second = block.attn2 and branches[1] and Attend.of(block.attn2, branches[1])
        feed_forward = branches[2] and FeedForward.of(block.ff, branches[2])
        if not first or not feed_forward or (block.attn2 is not None and not second):
            return None
        return FusedTransformer(block, first, second, feed_forward)

    def __call__(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Any = None,
        cross_attention_kwargs: Any = None,
        class_labels: Any = None,
        added_cond_kwargs: Any = None,
    ) -> Any:
        x, masks = hidden_states, (attention_mask, encoder_attention_mask)
        # what the first attention looks at, and the second
        others = encoder_hidden_states if self.block.only_cross_attention else None, encoder_hidden_states
        if not cross_attention_kwargs and self.takes(x, others):
            rows = self.modulations(Conditions(len(x), timestep, class_labels, added_cond_kwargs))
            if all(each.ndim == 3 and len(each) in (1, len(x)) and each.shape[2] == x.shape[2] for each in rows):
                return self.compute(x, others, masks, rows)
        return self.plainly(
            x,
            attention_mask,
            encoder_hidden_states,
            encoder_attention_mask,
            timestep,
            cross_attention_kwargs,
            class_labels,
            added_cond_kwargs,
        )

    def takes(self, x: Tensor, others: Sequence[Tensor | None]) -> bool:
        """Whether tokens x [B, N, C] that look at these others have the form that plans are made for."""
        if x.ndim != 3 or not x.numel() or x.shape[2] != self.first.out.out_features or self.block._chunk_size:
            return False
        pairs = [(attend.attention, x if other is None else other) for attend, other in zip(self.attends, others)]
        return all(
            type(attention.processor) is AttnProcessor2_0
            and (keys.ndim == 3 and len(keys) == len(x) and keys.numel() > 0)
            and keys.shape[2] == attention.to_k.in_features
            for attention, keys in pairs
        )

    def modulations(self, given: Conditions) -> list[Tensor]:
        """Scales, shifts and gates, [B or 1, K, C] each."""
        return MODULATIONS[self.block.norm_type](self.block, given)

    def compute(
        self, x: Tensor, others: Sequence[Tensor | None], masks: Sequence[Tensor | None], rows: Sequence[Tensor]
    ) -> Tensor:
        """x [B, N, C], which is not written to."""
        x = x.float().contiguous()
        others = [None if other is None else other.float().contiguous() for other in others[: len(self.attends)]]
        masks = [
            attend.mask(mask, x, x if other is None else other)
            for attend, other, mask in zip(self.attends, others, masks)
        ]
        out = torch.empty_like(x)
        told = *others, *masks, *rows
        each = self.step.together(len(x)).scale.ndim > 1
        key = *x.shape[:2], each, *(None if tensor is None else tensor.shape for tensor in told)
        plan = self.plans.get(key)
        if plan is None:
            plan = self.plans[key] = self.plan(x, others, masks, rows, each=each)
        plan(x, out, *(tensor for tensor in told if tensor is not None))
        return out

    def plan(
        self,
        x: Tensor,
        others: Sequence[Tensor | None],
        masks: Sequence[Tensor | None],
        rows: Sequence[Tensor],
        *,
        each: bool,
    ) -> Plan:
        """The passes for tensors of these shapes; samples have an interval ``each``, or there is one for all."""
        native = self.first.out.parts[0].native
        assert native is not None
        plan = Plan(native.library, self.step, len(x), each=each)
        start, out = plan.given("tokens", x.shape), plan.given("a block's result", x.shape)
        keys = [None if other is None else plan.given("other tokens", other.shape) for other in others]
        added = [None if mask is None else plan.given("a mask", mask.shape) for mask in masks]
        places = [plan.given("a modulation", tensor.shape) for tensor in rows]
        for attend, other, mask in zip(self.attends, keys, added, strict=True):
            attend.plan(plan, start, other, mask, places, out)
            start = out
        self.feed_forward.plan(plan, out, places)
        return plan


def is_one_call(layer: nn.Module) -> bool:
    """Whether all of a linear is one call of C, by an interval from a table."""
    return (
        type(layer) is IntegerLinear
        and len(layer.parts) == 1
        and layer.parts[0].native is not None
        and layer.step.columns([layer.parts[0].quantizer]) is not None
    )


def token_norm_of(module: Any) -> TokenNorm | None:
    """The norm of the last dimension as data, or None for another kind of norm."""
    if not isinstance(module, nn.LayerNorm | RMSNorm) or len(module.normalized_shape if isinstance(module, nn.LayerNorm) else module.dim) != 1:
        return None
    weight, bias = (None if p is None else p.detach().float().contiguous() for p in (module.weight, module.bias))
    return TokenNorm(weight, bias, module.eps, centered=isinstance(module, nn.LayerNorm))


def _branch(module: Any, rows: Rows | None = None) -> Branch | None:
    norm = token_norm_of(module)
    return None if norm is None else Branch(norm, rows)


Branches = tuple[Branch | None, Branch | None, Branch | None]
GATED = Rows(0, scale=1, shift=0, gate=2), Rows(0, scale=4, shift=3, gate=5)
"""Both gated branches of six rows."""

BRANCHES: dict[str, Callable[[Any], Branches]] = {
    "layer_norm": lambda b: (_branch(b.norm1), _branch(b.norm2), _branch(b.norm3)),
    "ada_norm": lambda b: (
        _branch(b.norm1.norm, Rows(0, 0, 1)),
        b.norm2 and _branch(b.norm2.norm, Rows(1, 0, 1)),
        _branch(b.norm3),
    ),
    "ada_norm_zero": lambda b: (_branch(b.norm1.norm, GATED[0]), _branch(b.norm2), _branch(b.norm3, GATED[1])),
    "ada_norm_single": lambda b: (_branch(b.norm1, GATED[0]), Branch(None), _branch(b.norm2, GATED[1])),
    "ada_norm_continuous": lambda b: (
        _branch(b.norm1.norm, Rows(0, 0, 1)),
        b.norm2 and _branch(b.norm2.norm, Rows(2, 0, 1)),
        _branch(b.norm3.norm, Rows(1, 0, 1)),
    ),
}
"""What the attentions and the feed-forward network of a block begin with, by its kind of norm."""


def _in_rows(linear: nn.Module, condition: Tensor, rows: int) -> Tensor:
    """linear(silu(condition [B, E] or [E])) as rows [B or 1, K, C]."""
    y: Tensor = linear(functional.silu(condition))
    return y.unflatten(-1, (rows, -1)).view(-1, rows, y.shape[-1] // rows)


def _ada_norm(block: Any, given: Conditions) -> list[Tensor]:
    norms = [norm for norm in (block.norm1, block.norm2) if norm is not None]
    return [_in_rows(norm.linear, norm.emb(given.timestep), 2) for norm in norms]


def _ada_norm_zero(block: Any, given: Conditions) -> list[Tensor]:
    embedded = block.norm1.emb(given.timestep, given.class_labels, hidden_dtype=torch.float32)
    return [_in_rows(block.norm1.linear, embedded, 6)]


def _ada_norm_single(block: Any, given: Conditions) -> list[Tensor]:
    rows: Tensor = block.scale_shift_table[None] + given.timestep.reshape(given.batch, 6, -1)
    return [rows]


def _ada_norm_continuous(block: Any, given: Conditions) -> list[Tensor]:
    assert given.added is not None
    norms = [norm for norm in (block.norm1, block.norm3, block.norm2) if norm is not None]
    return [_in_rows(norm.linear, given.added["pooled_text_emb"], 2) for norm in norms]


MODULATIONS: dict[str, Callable[[Any, Conditions], list[Tensor]]] = {
    "layer_norm": lambda block, given: [],
    "ada_norm": _ada_norm,
    "ada_norm_zero": _ada_norm_zero,
    "ada_norm_single": _ada_norm_single,
    "ada_norm_continuous": _ada_norm_continuous,
}
"""What a block's norms make of its conditions."""
