"""Activations that go into the quantizer behind them, against the simulated model, which computes one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from ptq_tdq.runtime.blocks import FusedAttention, FusedChain

CHAINS: dict[str, nn.Module] = {
    **{
        name: FeedForward(8, activation_fn=name)
        for name in ("gelu", "gelu-approximate", "geglu", "geglu-approximate", "swiglu")
    },
    "linears": nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Dropout(0.5), nn.Linear(12, 8), nn.SiLU()),
    "convolutions": nn.Sequential(
        nn.Conv1d(5, 6, 3, padding=1, padding_mode="circular"),
        nn.SiLU(),
        nn.Conv1d(6, 6, 3, padding=1),
        nn.GELU("tanh"),
        nn.Conv1d(6, 5, 3, padding=1, padding_mode="circular"),
    ),
}


class Residual(nn.Module):
    """x [B, 5, 8] plus what a chain makes of it, whose last module may be asked beside it."""

    def __init__(self, chain: nn.Module) -> None:
        super().__init__()
        self.chain = chain

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        last = list(self.chain.children())[-1]
        return x + self.chain(x) + (last(x) if isinstance(last, nn.SiLU) else 0)


@pytest.mark.parametrize("method", ["static", "dynamic-token"])
@pytest.mark.parametrize("name", CHAINS)
def test_it_computes_what_the_simulated_one_does(name: str, method: str, alike: Any) -> None:
    torch.manual_seed(0)
    integer = alike(Residual(CHAINS[name]), torch.randn(3, 5, 8), method=method)
    assert any(isinstance(vars(module).get("forward"), FusedChain) for module in integer.modules())


class OverPixels(nn.Module):
    """Attention over the pixels of x [B, 8, 4, 4], as in U-Nets."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention(8, heads=2, dim_head=4, norm_num_groups=2, bias=True, residual_connection=True)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        y: Tensor = self.attention(x)
        return y


def test_attention_over_pixels_is_fused_though_it_is_listened_to(alike: Any) -> None:
    torch.manual_seed(0)
    integer = alike(OverPixels(), torch.randn(3, 8, 4, 4))
    assert any(isinstance(vars(module).get("forward"), FusedAttention) for module in integer.modules())
