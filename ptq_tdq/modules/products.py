"""Attention products with quantizers of their own on q, k, v and the softmax output (method section 3.8).

A product is quantized where ``scaled_dot_product_attention`` is called, inside whatever module calls it: joint, cross,
rotary, masked or grouped attention and any processor of diffusers are alike here.
"""

from __future__ import annotations

import math
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ptq_tdq.modules.activation import ActivationQuantizer
from ptq_tdq.records import LayerRecord

OPERANDS = ("q", "k", "v", "softmax")
ATTRIBUTE = "products"  # of the module that computes them; `<module>.products.<i>` is the i-th in its forward pass


def owner_of(name: str) -> tuple[str, int]:
    """The module that computes the product of this name, and the product's number in its forward pass (-1: none)."""
    owner, _, number = name.rpartition(f".{ATTRIBUTE}.")
    return owner, int(number) if number.isdecimal() and number.isascii() else -1


class QuantProduct(nn.Module):
    """softmax(q k^T scale + mask) v with quantizers; with all of them off, torch's own function, bit for bit."""

    def __init__(self, record: LayerRecord) -> None:
        super().__init__()
        self.record = record
        self.inputs = nn.ModuleList(ActivationQuantizer(q) for q in record.inputs)

    def quantizers(self) -> list[ActivationQuantizer]:
        return [q for q in self.inputs if isinstance(q, ActivationQuantizer)]

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """As ``torch.nn.functional.scaled_dot_product_attention``: query [B, heads, N, d], key and value [.., M, d]."""
        quantizers = self.quantizers()
        if not any(q.enabled or q.observer for q in quantizers):
            return functional.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        on_query, on_key, on_value, on_softmax = quantizers
        # half precision overflows where torch's own function, which sums in float32, does not
        q, k, v = on_query(query).float(), on_key(key).float(), on_value(value).float()
        if enable_gqa:
            k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in (k, v))
        scores = q @ k.transpose(-1, -2) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
        if is_causal:
            scores = scores + torch.full(scores.shape[-2:], -torch.inf, device=q.device, dtype=q.dtype).triu(1)
        if attn_mask is not None:
            blocked = attn_mask.dtype == torch.bool
            scores = scores.masked_fill(~attn_mask, -torch.inf) if blocked else scores + attn_mask
        # a row that may look at nothing gives zeros, as torch's own function does
        probabilities = scores.softmax(-1).nan_to_num(0.0) if attn_mask is not None else scores.softmax(-1)
        return (on_softmax(probabilities) @ v).to(query.dtype)


class _Intercept(TorchFunctionMode):
    """Hands the calls of scaled_dot_product_attention inside one module to its products, in order.

    Calls beyond them begin with the first one again: a module may go through its samples one by one.
    """

    def __init__(self, owner: nn.Module) -> None:
        super().__init__()
        self.owner = owner
        self.next = cycle(products_of(owner))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.scaled_dot_product_attention:
            return next(self.next)(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def products_of(owner: nn.Module) -> list[Any]:
    """What computes the products of a module, in the order of its forward pass."""
    products = owner._modules.get(ATTRIBUTE)
    return list(products) if isinstance(products, nn.ModuleList) else []


def attach(owner: nn.Module, product: nn.Module) -> None:
    """Give ``owner`` one more product, called as ``scaled_dot_product_attention`` is; the first one makes its forward
    pass listen.
    """
    if ATTRIBUTE not in owner._modules:
        owner.add_module(ATTRIBUTE, nn.ModuleList())
        owner.register_forward_pre_hook(_begin)
        owner.register_forward_hook(_end, always_call=True)
    products = owner._modules[ATTRIBUTE]
    assert isinstance(products, nn.ModuleList)
    products.append(product)


def _begin(owner: nn.Module, args: Any) -> None:
    _Intercept(owner).__enter__()


def _end(owner: nn.Module, args: Any, output: Any) -> None:
    # modes are a stack of the thread, and calls of modules nest: the innermost mode is that of this call
    modes = torch.overrides._get_current_function_mode_stack()
    if modes and isinstance(modes[-1], _Intercept) and modes[-1].owner is owner:
        modes[-1].__exit__(None, None, None)
