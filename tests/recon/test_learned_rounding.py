"""Rounding that is learned from the closed form, and judged on trajectories held out from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from unit_calls import call_of

from ptq_tdq import Calls
from ptq_tdq.config import Config
from ptq_tdq.modules import QuantLayer
from ptq_tdq.recon.unit import Unit
from ptq_tdq.recon.weights import LOSS_POWER, initialize, round_last

Choose = Callable[..., Config]
NAME = "mid_block.resnets.0.conv1"


def test_a_unit_is_split_by_trajectories(unet: Any, calls: Calls) -> None:
    held = torch.arange(12) % 4 == 3
    for single in (False, True):
        unit = Unit("conv_in", unet.conv_in, calls.t, (slice(0, 5), slice(5, 12)), single, held_out=held)
        parts = [torch.cat([torch.arange(12)[batch] for batch in part.batches()]) for part in unit.split()]
        assert sorted(parts[1].tolist()) == [3, 7, 11]
        assert sorted(torch.cat(parts).tolist()) == list(range(12))
        drawn = torch.cat([unit.split()[0].draw(8, torch.Generator().manual_seed(i)) for i in range(20)])
        assert set(drawn.tolist()) == set(range(12)) - {3, 7, 11}
    assert all(part is whole for whole in [Unit("conv_in", unet.conv_in, calls.t)] for part in whole.split())


def learn(wrap: Any, config: Config, calls: Calls) -> tuple[list[float], QuantLayer]:
    """The loss of a layer with correlated inputs on seen and on held-out samples, before and after learning."""
    layer = wrap(config).layers()[NAME]
    generator = torch.Generator().manual_seed(0)
    x = torch.einsum("oc,nchw->nohw", *(torch.randn(s, generator=generator) for s in ((8, 2), (12, 2, 12, 12))))
    held = torch.arange(12) % 2 == 1
    unit = Unit(NAME, layer, calls.t, held_out=held)
    target = unit.outputs(call := call_of(NAME, x))
    initialize(layer, config)
    layer.weights_enabled = True
    seen, judge = unit.split()
    found = [part.loss(call, target, LOSS_POWER) for part in (seen, judge)]
    round_last(unit, call, call, target, config, generator, unit.loss(call, target, LOSS_POWER))
    return [*found, *(part.loss(call, target, LOSS_POWER) for part in (seen, judge))], layer


def test_it_pays_on_samples_not_learned_from(wrap: Any, choose: Choose, calls: Calls) -> None:
    config = choose(rounding="learned", weight_iterations=60, loss_power=LOSS_POWER)
    (seen, judged, seen_after, judged_after), layer = learn(wrap, config, calls)
    assert seen_after < 0.8 * seen and judged_after < 0.8 * judged
    assert all(w.rounding is None and w.codes is not None for w in layer.weight_quantizers())


@pytest.mark.parametrize("choices", [{"weight_lr": 1e3}, {"scale_lr": 1e3}, {"weight_iterations": 0}])
def test_what_does_not_pay_there_is_undone(wrap: Any, choose: Choose, calls: Calls, choices: Any) -> None:
    config = choose(**{"rounding": "learned", "weight_iterations": 8, "loss_power": LOSS_POWER, **choices})
    (seen, judged, seen_after, judged_after), _ = learn(wrap, config, calls)
    assert (seen_after, judged_after) == (seen, judged)
