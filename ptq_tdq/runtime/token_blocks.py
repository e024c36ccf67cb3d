"""Transformer blocks of tokens as one call of ``native.c``: norms, linears, attention and residual sums.

    x = x + gate attn(modulated(norm(x)))    for self-attention, cross-attention and the feed-forward network

Norms and what modulates them go before the quantizers of the linears that follow, gates and sums into the products.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor, nn

from ptq_tdq.modules.products import products_of
from ptq_tdq.runtime.attention import IntegerProduct, added, steps_of
from ptq_tdq.runtime.blocks import Fused, FusedChain
from ptq_tdq.runtime.kernels import Activation
from ptq_tdq.runtime.layer import IntegerLinear
from ptq_tdq.runtime.modulation import BRANCHES, MODULATIONS, Branch, Conditions
from ptq_tdq.runtime.passes import Place, Plan, Plans, in_passes

T = TypeVar("T")


class Attend:
    """Attention of a block: its linears, which are all in integers, and its product."""

    def __init__(self, attention: Any, branch: Branch, product: IntegerProduct) -> None:
        self.attention, self.branch, self.product = attention, branch, product
        self.out: IntegerLinear = attention.to_out[0]
        self.width: int = attention.to_k.in_features  # of the tokens that it looks at

    @staticmethod
    def of(attention: Any, branch: Branch | None) -> Attend | None:
        """None for another form of attention or norm, or where something stays in floating point."""
        if attention is None or branch is None:
            return None
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

    def takes(self, keys: Any, batch: int) -> bool:
        """Whether it looks at such tokens [B, M, C'], and by the processor that plans are made for."""
        if type(self.attention.processor) is not AttnProcessor2_0 or not isinstance(keys, Tensor):
            return False  # a text and images, for an adapter
        return keys.ndim == 3 and keys.shape[0] == batch and keys.shape[2] == self.width and keys.numel() > 0

    def mask(self, given: Tensor | None, queries: Tensor, keys: Tensor) -> Tensor | None:
        """What is added to the scores [B, heads, N or 1, M]."""
        if given is None:
            return None
        scores = len(keys), self.attention.heads, queries.shape[1], keys.shape[1]
        mask = self.attention.prepare_attention_mask(given, scores[-1], scores[0])
        whole, _ = steps_of(added(mask.view(*scores[:2], -1, mask.shape[-1])), scores)
        return whole

    def plan(
        self, plan: Plan, x: Place, other: Place | None, mask: Place | None, modulations: Sequence[Place], to: Place
    ) -> None:
        """The passes from x [B, N, C], and the ``other`` tokens [B, M, C'] that it looks at, to its sum with x."""
        attention = self.attention
        layers = (attention.to_q, attention.to_k, attention.to_v)
        y, rotated, gate = self.branch.plan(plan, x, modulations, layers if other is None else layers[:1])
        q = plan.layer(layers[0], y, rotated=rotated)
        k, v = (
            plan.layer(layer, y, rotated=rotated) if other is None else plan.layer(layer, other) for layer in layers[1:]
        )
        out = plan.attend(self.product, (q, k, v), attention.heads, mask)
        plan.layer(self.out, out, onto=x, gate=gate, to=to)


class FeedForward:
    """A feed-forward network of two integer linears with an activation between them."""

    def __init__(self, branch: Branch, first: IntegerLinear, second: IntegerLinear, activation: Activation) -> None:
        self.branch, self.first, self.second, self.activation = branch, first, second, activation

    @staticmethod
    def of(network: Any, branch: Branch | None) -> FeedForward | None:
        """None for another form of network or norm."""
        fused = FusedChain.of(network)
        if fused is None or len(fused.chain) != 2 or branch is None:
            return None
        (first, before), (second, activation) = fused.chain
        if not (is_one_call(first) and is_one_call(second)) or before is not None or activation is None:
            return None
        return FeedForward(branch, first, second, activation)  # type: ignore[arg-type]

    def plan(self, plan: Plan, x: Place, modulations: Sequence[Place]) -> None:
        """The passes from x [B, N, C] to its sum with the network's result, in its place."""
        y, rotated, gate = self.branch.plan(plan, x, modulations, [self.first])
        hidden = plan.layer(self.first, y, rotated=rotated)
        plan.layer(self.second, hidden, self.activation, onto=x, gate=gate, to=x)


class FusedTransformer(Fused):
    """BasicTransformerBlock, with any of its norms."""

    def __init__(self, block: Any, first: Attend, second: Attend | None, feed_forward: FeedForward) -> None:
        super().__init__(block)
        self.first, self.second, self.feed_forward = first, second, feed_forward
        self.attends = [attend for attend in (first, second) if attend is not None]
        self.step = first.out.step
        self.width: int = first.out.out_features  # of the block's tokens
        self.modulations = MODULATIONS[block.norm_type](block)
        self.plans = Plans()

    @staticmethod
    def of(block: Any) -> FusedTransformer | None:
        if block.norm_type not in BRANCHES or block.pos_embed is not None or hasattr(block, "fuser"):
            return None
        own, other, last = BRANCHES[block.norm_type](block)
        first, second, feed_forward = (
            Attend.of(block.attn1, own),
            Attend.of(block.attn2, other),
            FeedForward.of(block.ff, last),
        )
        if first is None or feed_forward is None or (second is None and block.attn2 is not None):
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
        if cross_attention_kwargs or not self.untouched or not self.takes(x, others):
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
        given = self.modulations.given(Conditions(x.shape[0], timestep, class_labels, added_cond_kwargs))
        return self.compute(x, others, masks, given)

    def takes(self, x: Tensor, others: Sequence[Tensor | None]) -> bool:
        """Whether tokens x [B, N, C] that look at these others have the form that plans are made for."""
        if x.ndim != 3 or not x.numel() or x.shape[2] != self.width or self.block._chunk_size:
            return False
        return all(attend.takes(x if other is None else other, x.shape[0]) for attend, other in self.pairs(others))

    def pairs(self, others: Sequence[T]) -> Iterator[tuple[Attend, T]]:
        """The attentions with what belongs to each."""
        return zip(self.attends, others, strict=False)

    def compute(
        self, x: Tensor, others: Sequence[Tensor | None], masks: Sequence[Tensor | None], given: Sequence[Tensor]
    ) -> Tensor:
        """x [B, N, C], which is not written to."""
        x = x.float().contiguous()
        others = [None if other is None else other.float().contiguous() for _, other in self.pairs(others)]
        keys = [x if other is None else other for other in others]
        masks = [attend.mask(mask, x, other) for (attend, mask), other in zip(self.pairs(masks), keys, strict=True)]
        given = [tensor.float().contiguous() for tensor in given]
        out = torch.empty_like(x)
        tensors = *others, *masks, *given
        each = not self.step.alike(x.shape[0])
        key = *x.shape[:2], each, *(None if tensor is None else tensor.shape for tensor in tensors)
        plan = self.plans.find(key, lambda: self.plan(x, others, masks, given, each=each))
        plan(x, out, *(tensor for tensor in tensors if tensor is not None))
        return out

    def plan(
        self,
        x: Tensor,
        others: Sequence[Tensor | None],
        masks: Sequence[Tensor | None],
        given: Sequence[Tensor],
        *,
        each: bool,
    ) -> Plan:
        """The passes for tensors of these shapes; samples have an interval ``each``, or there is one for all."""
        native = self.first.out.parts[0].native
        assert native is not None
        plan = Plan(native.library, self.step, len(x), each=each)
        start, out = plan.given("tokens", x.shape), plan.given("a block's result", x.shape)
        looked_at = [None if other is None else plan.given("other tokens", other.shape) for other in others]
        masked = [None if mask is None else plan.given("a mask", mask.shape) for mask in masks]
        modulations = self.modulations.plan(plan, [plan.given("a modulation", tensor.shape) for tensor in given])
        for attend, other, mask in zip(self.attends, looked_at, masked, strict=True):
            with plan.branch():
                attend.plan(plan, start, other, mask, modulations, out)
            start = out
        with plan.branch():
            self.feed_forward.plan(plan, out, modulations)
        return plan


def is_one_call(layer: nn.Module) -> bool:
    """Whether all of a linear is one call of C, by an interval from a table."""
    return isinstance(layer, IntegerLinear) and len(layer.parts) == 1 and in_passes(layer, IntegerLinear)
