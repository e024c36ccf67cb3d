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
def test_it_computes_what_the_simulated_one_does(name: str, method: str, both: Any) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, 8)
    given = [{"x": x * (1 + t / 400), "timestep": torch.full((3,), t)} for t in (1000.0, 500.0, 1.0)]
    simulated, integer = both(Residual(CHAINS[name]), given, method=method)
    assert any(isinstance(vars(module).get("forward"), FusedChain) for module in integer.modules())
    for t in (torch.tensor(500), torch.tensor([0.5, 999.0, 20.0])):
        with torch.no_grad():
            expected, found = (model(x, t) for model in (simulated, integer))
        difference = (found - expected).pow(2).mean()
        assert difference < 1e-4 * expected.pow(2).mean()  # a tie here or there


class OverPixels(nn.Module):
    """Attention over the pixels of x [B, 8, 4, 4], as in U-Nets."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention(8, heads=2, dim_head=4, norm_num_groups=2, bias=True, residual_connection=True)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        y: Tensor = self.attention(x)
        return y


def test_attention_over_pixels_is_fused_though_it_is_listened_to(both: Any) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 8, 4, 4)
    given = [{"x": x * (1 + t / 400), "timestep": torch.full((3,), t)} for t in (1000.0, 500.0, 1.0)]
    simulated, integer = both(OverPixels(), given)
    assert any(isinstance(vars(module).get("forward"), FusedAttention) for module in integer.modules())
    for t in (torch.tensor(500), torch.tensor([0.5, 999.0, 20.0])):
        with torch.no_grad():
            expected, found = (model(x, t) for model in (simulated, integer))
        assert (found - expected).pow(2).mean() < 1e-4 * expected.pow(2).mean()
