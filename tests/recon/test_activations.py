"""Which samples phase A learns from, and what it observes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ptq_tdq import Calls, calibrate, preset, record
from ptq_tdq.config import Config
from ptq_tdq.plan import Special
from ptq_tdq.quantized_model import QuantizedModel
from ptq_tdq.recon import UnitReport, reconstruct
from ptq_tdq.recon.activations import sample_chances
from ptq_tdq.recon.parts import Part, Parts, Place
from ptq_tdq.recon.unit import Unit


def outputs(x: Tensor) -> Parts:
    return Parts((Part.of(x, slice(0, len(x)), (Place(0, 1),)),))


def test_an_unlearned_unit_keeps_its_first_interval_and_nearest_rounding(
    wrap: Callable[[Config], QuantizedModel], choose: Callable[..., Config], calls: Calls
) -> None:
    config = choose(method="static", interval_lr=1e-2, interval_parameter="log", activation_iterations=10)
    quantized, reports = wrap(config), list[UnitReport]()
    special = Special(unlearned=frozenset({"conv_out"}))
    static = reconstruct(quantized, calls, config, special=special, on_unit=reports.append)
    assert {r.after == r.before for r in reports if r.unit == "conv_out"} == {True}
    tables = {name: q.source.table(1)[0][0] for name, q in quantized.quantizers().items() if q.source}
    moved = {name for name, scale in tables.items() if not torch.isclose(scale, static[name].scale, rtol=1e-5)}
    assert moved - {"conv_in"} and "conv_out" not in moved  # x_t is not clipped


class Looped(nn.Module):
    """One block that runs three times, on numbers that grow."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 4))])
        self.last = nn.Linear(4, 4)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        for _ in range(3):
            x = 3 * (x + self.blocks[0](x))
        result: Tensor = self.last(x + timestep.view(-1, 1))
        return result


def test_a_unit_that_runs_several_times_covers_what_it_sees_in_each() -> None:
    torch.manual_seed(0)
    model, seen = Looped(), list[Tensor]()
    with record(model) as recorded, torch.no_grad():
        model(torch.randn(24, 4), torch.tensor([9.0, 5.0, 1.0]).repeat(8))
    config = preset("default", scheme="W8A8", method="static", activation_range="minmax", activation_iterations=2)
    quantized = calibrate(model, config, recorded)
    assert any("several times" in notice for notice in quantized.notices)
    model.blocks[0][2].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(**recorded.inputs(slice(0, 24)))
    (quantizer,) = quantized.layers()["blocks.0.2"].activation_quantizers()
    scale, zero_point = (x[0] for x in quantizer.source.table(1000))
    low, high = scale * (quantizer.qtype.qmin - zero_point), scale * (quantizer.qtype.qmax - zero_point)
    assert seen[2].abs().max() > 3 * seen[0].abs().max()
    ends, expected = torch.stack([low, high]), torch.stack(torch.cat(seen).aminmax())
    torch.testing.assert_close(ends, expected, rtol=0.03, atol=float(scale))


@pytest.mark.parametrize("power", [1.5, 2.4])
def test_relative_loss_weights_make_up_for_the_size_of_a_step(
    power: float, wrap: Callable[[Config], QuantizedModel], choose: Callable[..., Config], calls: Calls
) -> None:
    quantized = wrap(choose())
    unit = Unit("conv_in", quantized.model.get_submodule("conv_in"), calls.t)
    size = torch.tensor([4.0, 2.0, 1.0]).repeat(4)  # at t = 999, 500, 1
    chances = sample_chances(unit, outputs(size.view(-1, 1, 1, 1).expand(-1, 3, 4, 4)), power)
    torch.testing.assert_close(chances * size**power, torch.full((12,), chances[0] * size[0] ** power))
    drawn = unit.draw(6000, torch.Generator().manual_seed(0), chances)
    counts = torch.bincount(drawn % 3, minlength=3).double()
    expected = torch.tensor([4.0, 2.0, 1.0]).double() ** -power
    torch.testing.assert_close(counts / counts.sum(), expected / expected.sum(), rtol=0, atol=0.03)
    everything_zero = sample_chances(unit, outputs(torch.zeros(12, 3, 4, 4)), power)
    assert bool(torch.isfinite(everything_zero).all()) and everything_zero.unique().numel() == 1


def test_samples_are_drawn_from_one_cell(calls: Calls) -> None:
    """Rows of two groups, of a unit that takes one time step at a time: each draw is of one group and one t."""
    generator = torch.Generator().manual_seed(0)
    spans = (slice(0, 5), slice(5, 12))
    unit = Unit("a", torch.nn.Identity(), calls.t, spans, single=True)
    drawn = [unit.draw(6, generator) for _ in range(300)]
    assert all(len(index) == 6 for index in drawn)
    for index in drawn:
        assert len(calls.t[index].unique()) == 1 and len((index < 5).unique()) == 1
    counts = torch.bincount(torch.cat(drawn), minlength=12) / (6 * len(drawn))
    torch.testing.assert_close(counts, torch.full((12,), 1 / 12), rtol=0, atol=0.05)
    batches = [torch.arange(12)[index] for index in unit.batches()]
    assert torch.cat(batches).sort().values.tolist() == list(range(12))
    assert all(len(calls.t[index].unique()) == 1 and len((index < 5).unique()) == 1 for index in batches)
