"""The sweep must be nothing but the forward pass: for both streams, in chunks, in memory or on disk."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from ptq_tdq import Calls, QuantizedModel, calibrate, preset, record
from ptq_tdq.config import Config
from ptq_tdq.errors import ModelError
from ptq_tdq.recon import UnitReport
from ptq_tdq.recon.parts import Part, Parts, Place, Store
from ptq_tdq.recon.streams import Chunk, UnitCall, layouts, sweep
from ptq_tdq.recon.unit import Unit
from ptq_tdq.wrap import switched

Wrap = Callable[[Config], QuantizedModel]


def chunks_of(model: nn.Module, units: list[str], calls: Calls, size: int, finals: list[Any]) -> list[Chunk]:
    of_groups = layouts(model, units, calls)
    ends = [span.stop for _, span in calls.spans()]

    def forward(chunk: slice) -> None:
        finals.append(model(**calls.inputs(chunk)))

    return [
        (partial(forward, chunk), chunk, of_groups[next(i for i, end in enumerate(ends) if chunk.stop <= end)])
        for chunk in calls.chunks(size)
    ]


@pytest.mark.parametrize("on_disk", [False, True])
def test_both_streams_are_plain_forward_passes(
    wrap: Wrap, choose: Callable[..., Config], unet: nn.Module, calls: Calls, on_disk: bool
) -> None:
    """The quantized stream is one with each unit's output doubled: it must not leak into the other one."""
    quantized = wrap(choose())
    model, units = quantized.model, quantized.units()
    finals: list[Any] = []
    seen: list[str] = []
    store = Store(on_disk)

    def process(full: UnitCall, other: UnitCall) -> tuple[Parts, Parts]:
        assert full.unit == other.unit == units[len(seen)]
        seen.append(full.unit)
        unit = Unit(full.unit, model.get_submodule(full.unit), calls.t, other.spans, store=store)
        doubled = unit.outputs(other)
        for part in doubled.parts:
            for leaf in part.leaves:
                leaf.mul_(2)
        return unit.outputs(full), doubled

    sweep(model, units, chunks_of(model, units, calls, 5, finals), store, process)
    assert seen == units

    with torch.no_grad():
        inputs = calls.inputs(slice(0, 12))
        expected = unet(**inputs).sample
        torch.testing.assert_close(torch.cat([f.sample for f in finals[:3]]), expected, rtol=1e-4, atol=1e-5)
        handles = [model.get_submodule(u).register_forward_hook(lambda m, a, output: 2 * output) for u in units]
        doubled = model(**inputs).sample
        for handle in handles:
            handle.remove()
        found = torch.cat([f.sample for f in finals[3:]])
        torch.testing.assert_close(found, doubled, rtol=1e-4, atol=1e-4 * doubled.abs().max().item())
        assert not torch.allclose(doubled, expected)


class Block(nn.Module):
    """What blocks of transformers get and give: tokens first, masks that only some need, a row for no sample."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(4, 4)

    def forward(
        self, x: Tensor, text: Tensor, *, t: Tensor, mask: Tensor | None, table: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [N, B, 4], text [B, M, 4], t [B + 1, 4], mask [B, M]."""
        weight = torch.ones_like(text[..., 0]) if mask is None else mask.float()
        pooled = (text * weight[..., None]).sum(1) / weight.sum(1, keepdim=True)
        x = self.mix(x) + pooled + t[:-1] + t[-1]
        return x * table, text + x.mean(0)[:, None], t


class Wild(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor, mask: Tensor) -> tuple[Tensor]:
        used = None if bool(mask.all()) else mask
        t = torch.cat([timestep, timestep.new_zeros(1)])[:, None].expand(-1, 4) / 1000
        x = x.transpose(0, 1)
        for block in self.blocks:
            x, text, t = block(x, text, t=t, mask=used, table=torch.linspace(1, 2, 4))
        return (x.transpose(0, 1),)


def wild_calls(model: nn.Module) -> Calls:
    """Prompts of 3 tokens, some padded, and of 5, none padded."""
    torch.manual_seed(1)
    with record(model) as calls, torch.no_grad():
        for t in (999.0, 500.0, 1.0):
            for tokens, padded in ((3, 2), (5, 5), (3, 3)):
                mask = torch.arange(tokens) < torch.tensor([tokens, padded])[:, None]
                model(torch.randn(2, 6, 4), torch.full((2,), t), torch.randn(2, tokens, 4), mask)
    return calls


@pytest.mark.parametrize("size", [2, 3, 64])
def test_rows_are_told_apart_wherever_they_lie(size: int) -> None:
    model = Wild().requires_grad_(False)
    calls = wild_calls(model)
    units = ["blocks.0", "blocks.1"]
    finals: list[Any] = []

    def process(full: UnitCall, other: UnitCall) -> tuple[Parts, Parts]:
        unit = Unit(full.unit, model.get_submodule(full.unit), calls.t, other.spans)
        for index in [unit.draw(4, torch.Generator().manual_seed(seed)) for seed in range(5)]:
            part, whole = other.output(unit.run(other, index), index), unit.outputs(other)
            for found, expected in zip(part.real(slice(0, 4)), whole.real(index), strict=True):
                torch.testing.assert_close(found, expected)
        return unit.outputs(full), unit.outputs(other)

    chunks = chunks_of(model, units, calls, size, finals)
    sweep(model, units, chunks, Store(False), process)
    for final, (_, span, _) in zip(finals, [*chunks, *chunks], strict=True):
        torch.testing.assert_close(final[0], model(**calls.inputs(span))[0])


def test_a_model_with_groups_of_calls_is_calibrated_whole() -> None:
    model = Wild().requires_grad_(False)
    calls = wild_calls(model)
    assert len(calls.groups) == 2
    config = preset("default", scheme="W8A8", activation_iterations=2, compute_dtype="float32", eight_bit_layers="")
    few = {"weight_iterations": 2, "float_input_layers": "", "weight_only_layers": ""}
    quantized = calibrate(model, config.changed(few), calls)
    assert list(quantized.quantizers()) == ["blocks.0.mix", "blocks.1.mix"]
    for chunk in calls.chunks(2):
        found, expected = quantized(**calls.inputs(chunk))[0], model(**calls.inputs(chunk))[0]
        assert (found - expected).norm() < 0.1 * expected.norm()


def test_a_part_gives_back_what_it_was_made_of() -> None:
    x, text, more = torch.randn(5, 6, 4), torch.randn(12, 2), torch.randn(7, 3)
    tree = ({"x": x, "none": None}, [text, 3], more)
    places = (Place(1, 3), None, Place(0, 6), None, Place(0, 3, 1))
    part = Part.of(tree, slice(10, 12), places)
    again, (second, three), rest = part[slice(10, 12)]
    assert torch.equal(again["x"], x) and again["none"] is None
    assert torch.equal(second, text) and three == 3 and torch.equal(rest, more)
    one = part[torch.tensor([11])]
    assert torch.equal(one[0]["x"], x[:, 3:]) and torch.equal(one[1][0], text[6:]) and torch.equal(one[2], more[3:])


def test_the_model_is_whole_again_after_an_error(
    wrap: Wrap, choose: Callable[..., Config], unet: nn.Module, calls: Calls
) -> None:
    quantized = wrap(choose())

    def process(full: UnitCall, mine: UnitCall) -> tuple[Parts, Parts]:
        raise KeyboardInterrupt

    inputs, units = calls.inputs(slice(0, 12)), quantized.units()
    with pytest.raises(KeyboardInterrupt):
        sweep(quantized.model, units, chunks_of(quantized.model, units, calls, 12, []), Store(False), process)
    assert torch.equal(quantized(**inputs).sample, unet(**inputs).sample)


def test_samples_that_take_different_ways_are_an_error() -> None:
    class Forked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) if x.sum() > 0 else self.b(x)

    model = Forked()
    chunks: list[Chunk] = [
        (partial(model, x), slice(i, i + 1), {}) for i, x in enumerate((torch.ones(1, 2), -torch.ones(1, 2)))
    ]
    with pytest.raises(ModelError, match=r"different ways for different samples \(at a, b\); record"):
        sweep(model, ["a", "b"], chunks, Store(False), lambda full, mine: (full.arguments, mine.arguments))


class Experts(nn.Module):
    """Sends each token to one of its experts."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(4, 2), nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        flat, y = x.flatten(0, 1), torch.zeros_like(x).flatten(0, 1)
        for number, expert in enumerate(self.experts):
            mine = (self.router(flat).argmax(1) == number).nonzero().flatten()
            y = y.index_add(0, mine, expert(flat[mine]))
        return y.view_as(x)


class Routed(nn.Module):
    """Tokens through experts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.first, self.middle = nn.Linear(4, 4), Experts()

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """sample [B, N, 4]."""
        result: Tensor = self.middle(self.first(sample) * timestep[:, None, None] / 500)
        return result


@pytest.mark.parametrize("helped", ["", "_no_split_modules", "skip"])
def test_experts_are_reconstructed_together_or_left_out(helped: str) -> None:
    model = Routed().eval()
    if helped == "_no_split_modules":
        model._no_split_modules = ["Experts"]  # type: ignore[assignment]
    with record(model) as calls, torch.no_grad():
        for t in (900.0, 500.0, 100.0):
            model(torch.randn(12, 31, 4), torch.full((12,), t))
    skip = ("middle.experts.*",) if helped == "skip" else ()
    config = preset("default", method="static", activation_iterations=1, compute_dtype="float32", skip=skip)
    if not helped:
        learned: list[UnitReport] = []
        with pytest.raises(ModelError, match=r"class of the module .* model's _no_split_modules, or skip the layers"):
            calibrate(model, config, calls, on_unit=learned.append)
        assert not learned, "before anything is spent"
    else:
        units = calibrate(model, config, calls).units()
        assert units == (["first", "middle.router"] if helped == "skip" else ["first", "middle"])


def test_function_modes_around_a_run_stay_in_force(calls: Calls, unet: nn.Module) -> None:
    """A default device is such a mode."""
    config = preset("default", method="static", rounding="nearest", activation_iterations=0, round_again=False)
    with torch.device("cpu"):
        before = torch.overrides._get_current_function_mode_stack()
        calibrate(unet, config, calls)
        assert torch.overrides._get_current_function_mode_stack() == before
    assert not torch.overrides._get_current_function_mode_stack()


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_a_store_concatenates(on_disk: bool, dtype: torch.dtype) -> None:
    chunks = [torch.arange(n * 6).view(n, 2, 3).to(dtype) for n in (4, 1, 3)]
    whole = Store(on_disk).join(chunks)
    assert whole.dtype == dtype and torch.equal(whole, torch.cat(chunks))


def test_switched_restores_each_quantizer(wrap: Wrap, choose: Callable[..., Config]) -> None:
    quantized = wrap(choose())
    layer = quantized.layers()["conv_in"]
    layer.weights_enabled = True
    with switched(quantized.model, weights=False, activations=True):
        assert not layer.weights_enabled and all(q.enabled for q in quantized.quantizers().values())
    assert layer.weights_enabled and not any(q.enabled for q in quantized.quantizers().values())
    assert not quantized.layers()["conv_out"].weights_enabled


class InAutocast(nn.Module):
    """A model of its own autocast, with an operation in it that has to be in bfloat16 before the blocks are."""

    _no_split_modules: ClassVar = ["Linear"]

    def __init__(self) -> None:
        super().__init__()
        self.first, self.time, self.last = nn.Linear(4, 8), nn.Linear(1, 8), nn.Linear(8, 4)
        self.blocks, self.between = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)]), nn.Parameter(torch.eye(8))

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            x = (self.first(sample) + self.time(timestep[:, None, None] / 1000)) @ self.between
            for block in self.blocks:
                x = x + block(x)
            assert x.dtype == torch.bfloat16
            out: Tensor = self.last(x)
        return out.float()


def test_a_model_computes_in_its_own_autocast_while_it_is_calibrated() -> None:
    torch.manual_seed(0)
    model = InAutocast().requires_grad_(False)
    with record(model, num_train_timesteps=1000) as calls, torch.no_grad():
        for t in (999.0, 500.0, 1.0):
            model(torch.randn(3, 3, 4), torch.full((3,), t))
    quantized = calibrate(model, preset("default", scheme="W8A8", weight_iterations=2, activation_iterations=2), calls)
    inputs = calls.inputs(slice(0, 9))
    expected = model(**inputs)
    assert (quantized(**inputs) - expected).norm() < 0.03 * expected.norm()
