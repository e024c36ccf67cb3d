"""Calls in several threads, each at a time step of its own, against the same calls one after the other."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

THREADS = 8


class Small(nn.Module):
    """A convolution, a linear that sees each sample twice, and attention: a call takes a fraction of a millisecond."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear, self.out = nn.Conv1d(4, 4, 3, padding=1), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        y = self.conv(x).transpose(1, 2)
        y = self.linear(torch.cat([y, -y], 1).unflatten(1, (2, -1)).flatten(0, 1)).unflatten(0, (-1, 2))
        return self.out(functional.scaled_dot_product_attention(y, y, y).sum(1))


def calls_of(x: Tensor, count: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(3)
    times = torch.rand(count, len(x), generator=generator) * 1000
    times[1::3] = times[1::3].round()
    times[2::3] = times[2::3, :1]  # one t for all
    return [{"x": x, "timestep": t} for t in times]


def run_both_ways(integer: nn.Module, calls: list[dict[str, Any]], read: Callable[[Any], Tensor]) -> None:
    alone = [read(integer(**call)) for call in calls]
    with ThreadPoolExecutor(THREADS) as pool:
        together = list(pool.map(lambda call: read(integer(**call)), calls))
    differing = [i for i, (a, b) in enumerate(zip(alone, together, strict=True)) if not torch.equal(a, b)]
    assert not differing
    assert not torch.equal(alone[0], alone[1])  # t matters


def test_thousands_of_small_calls(both: Any) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4, 6)
    _, integer = both(
        Small(),
        [{"x": x * (1 + t / 300), "timestep": torch.full((2,), t)} for t in (1000.0, 500.0, 1.0)],
        method="step-table",
    )
    run_both_ways(integer, calls_of(x, 2000), lambda y: y)


def test_time_projections_of_a_unet(both: Any, tiny_unet: Any) -> None:
    x = torch.randn(2, 3, 8, 8)
    given = [{"sample": x, "timestep": torch.full((2,), t)} for t in (1000.0, 500.0, 1.0)]
    _, integer = both(tiny_unet(), given, weight_only_layers=("time_embedding",))
    assert any(
        f.projections for m in integer.modules() if (f := m.__dict__.get("forward")) and hasattr(f, "projections")
    )
    calls = [{"sample": call["x"], "timestep": call["timestep"]} for call in calls_of(x, 48)]
    run_both_ways(integer, calls, lambda output: output.sample)
