"""The attention product with quantizers of its own on q, k, v and the softmax output (method section 3.8)."""

from __future__ import annotations

from typing import Any

from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from ptq_tdq.modules.activation import ActivationQuantizer
from ptq_tdq.records import LayerRecord
from ptq_tdq.timeaxis import Clock

OPERANDS = ("q", "k", "v", "softmax")


class QuantAttnProcessor(nn.Module):
    """A diffusers attention processor; while its quantizers are off it hands over to the original processor.

    Covers self- and cross-attention with the residual, group norm and 4-d inputs of ``Attention``; q, k, v are
    quantized as [B, heads, N, d], the softmax output as [B, heads, N, M] with codes that start at 0.
    """

    def __init__(self, original: Any, record: LayerRecord, clock: Clock) -> None:
        super().__init__()
        self.original, self.record = original, record
        self.inputs = nn.ModuleList(ActivationQuantizer(q, clock) for q in record.inputs)

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        quantizers = [q for q in self.inputs if isinstance(q, ActivationQuantizer)]
        if not any(q.enabled or q.observer for q in quantizers):
            result: Tensor = self.original(
                attn,
                hidden_states,
                encoder_hidden_states=encoder_hidden_states,
                attention_mask=attention_mask,
                temb=temb,
                **kwargs,
            )
            return result
        quantize_q, quantize_k, quantize_v, quantize_softmax = quantizers
        residual, shape = hidden_states, hidden_states.shape
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        if len(shape) == 4:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if encoder_hidden_states is not None and attn.norm_cross:
            context = attn.norm_encoder_hidden_states(context)

        def heads(x: Tensor) -> Tensor:
            split: Tensor = x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            return split

        q, k, v = heads(attn.to_q(hidden_states)), heads(attn.to_k(context)), heads(attn.to_v(context))
        if attn.norm_q is not None:
            q = attn.norm_q(q)
        if attn.norm_k is not None:
            k = attn.norm_k(k)
        scores = quantize_q(q) @ quantize_k(k).transpose(-1, -2) * attn.scale
        if attention_mask is not None:
            mask = attn.prepare_attention_mask(attention_mask, k.shape[2], len(q))
            scores = scores + mask.view(len(q), attn.heads, -1, mask.shape[-1])
        out = quantize_softmax(scores.softmax(-1)) @ quantize_v(v)
        out = out.transpose(1, 2).flatten(2)
        out = attn.to_out[1](attn.to_out[0](out))
        if len(shape) == 4:
            out = out.transpose(1, 2).reshape(shape)
        if attn.residual_connection:
            out = out + residual
        out = out / attn.rescale_output_factor
        assert isinstance(out, Tensor)
        return out
