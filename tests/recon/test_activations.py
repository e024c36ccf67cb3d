"""Which samples phase A learns from."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from ptq_tdq.config import Config
from ptq_tdq.quantized_model import QuantizedModel
from ptq_tdq.recon import Samples
from ptq_tdq.recon.activations import _chances, _draw
from ptq_tdq.recon.unit import Unit


@pytest.mark.parametrize("power", [1.5, 2.4])
def test_relative_loss_weights_make_up_for_the_size_of_a_step(
    power: float, wrap: Callable[[Config], QuantizedModel], choose: Callable[..., Config], samples: Samples
) -> None:
    quantized = wrap(choose())
    unit = Unit("conv_in", quantized.model.get_submodule("conv_in"), quantized.clock, samples.t)
    size = torch.tensor([4.0, 2.0, 1.0]).repeat(4)  # at t = 999, 500, 1
    chances = _chances(unit, size.view(-1, 1, 1, 1).expand(-1, 3, 4, 4), power)
    torch.testing.assert_close(chances * size**power, torch.full((12,), chances[0] * size[0] ** power))
    drawn = _draw(12, chances, 6000, torch.Generator().manual_seed(0))
    counts = torch.bincount(drawn % 3, minlength=3).double()
    expected = torch.tensor([4.0, 2.0, 1.0]).double() ** -power
    torch.testing.assert_close(counts / counts.sum(), expected / expected.sum(), rtol=0, atol=0.03)
    everything_zero = _chances(unit, torch.zeros(12, 3, 4, 4), power)
    assert bool(torch.isfinite(everything_zero).all()) and everything_zero.unique().numel() == 1
