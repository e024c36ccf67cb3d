"""What a dry run measures of a model, and that it leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ptq_tdq import Calls, QuantizedModel
from ptq_tdq.config import Config
from ptq_tdq.modules import products
from ptq_tdq.recon import size
from ptq_tdq.recon.forecast import unit_seconds
from ptq_tdq.recon.pace import Pace, Rates, quantizing, unit_paces
from ptq_tdq.recon.size import UnitSize, unit_sizes

Wrap = Callable[[Config], QuantizedModel]


def test_each_unit_is_timed_and_the_model_stays_as_it_was(
    wrap: Wrap, choose: Callable[..., Config], calls: Calls
) -> None:
    quantized, arguments = wrap(config := choose()), calls.inputs(slice(0, 3))
    with torch.no_grad():
        before = quantized(**arguments)[0]
    paces = unit_paces(quantized, calls, unit_sizes(quantized, calls.inputs(slice(0, 1))), config)
    assert set(paces) == set(quantized.units())
    assert sum(pace.quantizers for pace in paces.values()) == len(quantized.quantizers())
    layers = [layer.record.unit for layer in quantized.layers().values()]
    assert all(pace.plain > 0 and 0 <= pace.reach <= layers.count(name) for name, pace in paces.items())
    assert all(q.source is None and not q.enabled for q in quantized.quantizers().values())
    with torch.no_grad():
        assert torch.equal(quantized(**arguments)[0], before)


@pytest.mark.parametrize("block", [products.BLOCK, 16])
def test_no_more_is_kept_for_gradients_than_was_counted(
    block: int, wrap: Wrap, choose: Callable[..., Config], calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantized, arguments = wrap(choose()), calls.inputs(slice(0, 1))
    monkeypatch.setattr(products, "BLOCK", block)
    monkeypatch.setattr(size, "BLOCK_BYTES", 32 * block)
    counted = sum(each.made for each in unit_sizes(quantized, arguments).values())
    own = {x.untyped_storage().data_ptr() for x in quantized.state_dict().values()}
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in own:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with quantizing(quantized.model), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        quantized(**arguments)
    assert 0 < sum(kept.values()) <= counted


def test_processes_share_samples_and_rows_but_each_starts_all_sources(
    wrap: Wrap, choose: Callable[..., Config], calls: Calls
) -> None:
    layers, config = list(wrap(choose()).layers().values()), choose(rounding="gptq", method="tdq")

    def taken(processes: int, **rates: float) -> float:
        pace = Pace(1.0, 1.0, 1.0, 0.5, len(layers))
        found = Rates(
            **dict.fromkeys(("product", "double", "search", "pick", "pick_linear", "rounding", "start"), 0.0) | rates
        )
        return sum(unit_seconds(layers, UnitSize(), pace, found, config, 128, processes, 0.5))

    assert taken(4) == taken(1) / 4
    assert taken(4, product=1.0, rounding=1.0) == pytest.approx(taken(1, product=1.0, rounding=1.0) / 4)
    assert taken(4, start=1.0) - taken(4) == taken(1, start=1.0) - taken(1) > 0
