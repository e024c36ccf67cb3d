"""Which quantizers "auto" gives intervals of tokens, where the user lets it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ptq_tdq import Calls, QuantizedModel, calibrate, preset, record

CHOICES = {
    "scheme": "W8A4",
    "rounding": "nearest",
    "activation_iterations": 10,
    "token_intervals": "auto",
    "fixed_layers": (),
    "eight_bit_layers": (),
    "weight_only_layers": (),
}


class Uneven(nn.Module):
    """The tokens of ``uneven`` differ tenfold in size, each sample in its own way; those of ``even`` are alike."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.even, self.uneven = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        y: Tensor = self.even(sample.sign() + 0.1 * sample)
        return y + self.uneven(sample * (1 + 9 * (sample[..., :1] > 0.5)))


@pytest.fixture(scope="module")
def uneven() -> tuple[nn.Module, Calls]:
    model = Uneven().eval().requires_grad_(False)
    t = torch.linspace(0, 990, 6).repeat(16)
    with record(model) as calls, torch.no_grad():
        model(torch.randn(len(t), 8, 16, generator=torch.Generator().manual_seed(1)), t)
    return model, calls


def methods(quantized: QuantizedModel) -> dict[str, str]:
    return {q.name: q.method for layer in quantized.plan for q in layer.inputs}


def test_tokens_have_intervals_of_their_own_where_that_pays(uneven: tuple[nn.Module, Calls]) -> None:
    model, calls = uneven
    found = calibrate(model, preset("default", **CHOICES), calls)
    assert methods(found) == {"even": "static", "uneven": "dynamic-token"}
    gains = {q.name: q.gain_db for layer in found.plan for q in layer.inputs}
    assert gains["uneven"] is not None and gains["uneven"] > 0.2


def test_without_leave_nothing_is_found_at_run_time(uneven: tuple[nn.Module, Calls]) -> None:
    model, calls = uneven
    found = calibrate(model, preset("default", **CHOICES | {"token_intervals": "never"}), calls)
    assert "dynamic-token" not in methods(found).values()


def test_a_resumed_run_remembers_the_choice(uneven: tuple[nn.Module, Calls], tmp_path: Path) -> None:
    model, calls = uneven
    first, again = (calibrate(model, preset("default", **CHOICES), calls, run_directory=tmp_path) for _ in range(2))
    x, t = torch.randn(3, 8, 16), torch.tensor([500.0])
    assert methods(first) == methods(again)
    assert torch.equal(first(x, t), again(x, t))
