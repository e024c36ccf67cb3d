"""Whole runs of both phases on a tiny U-Net: guarantees, not values."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from recorded import calls_of
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from unit_calls import call_of

from ptq_tdq import Calls, calibrate
from ptq_tdq.config import Config
from ptq_tdq.errors import NonFiniteError, ResumeError
from ptq_tdq.intervals.dynamic import Dynamic
from ptq_tdq.intervals.table import TableSource
from ptq_tdq.quantized_model import QuantizedModel
from ptq_tdq.recon import RunDirectory, UnitReport, reconstruct
from ptq_tdq.recon.unit import Unit, reconstruction_loss
from ptq_tdq.recon.weights import LOSS_POWER, reconstruct_weights

T = 1000
Wrap = Callable[[Config], QuantizedModel]
Choose = Callable[..., Config]


def run(quantized: QuantizedModel, calls: Calls, config: Config, **options: Any) -> list[UnitReport]:
    reports: list[UnitReport] = []
    quantized.static = reconstruct(quantized, calls, config, on_unit=reports.append, **options)
    return reports


def state(quantized: QuantizedModel) -> dict[str, Tensor]:
    """Everything that a run decides."""
    found: dict[str, Tensor] = {}
    for name, layer in quantized.layers().items():
        for i, weight in enumerate(layer.weight_quantizers()):
            assert weight.codes is not None and weight.scale is not None and weight.zero_point is not None
            found |= {f"{name}.{i}.c": weight.codes, f"{name}.{i}.s": weight.scale, f"{name}.{i}.z": weight.zero_point}
        if layer.shift is not None:
            found[f"{name}.shift"] = layer.shift.detach().clone()
    for name, quantizer in quantized.quantizers().items():
        assert isinstance(quantizer.source, TableSource | Dynamic)
        found |= {f"{name}.{key}": value for key, value in quantizer.source.named_buffers()}
        found |= {f"{name}.static": quantized.static[name].scale, f"{name}.z": quantized.static[name].zero_point}
    return found


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [key for key in a if not torch.equal(a[key], b[key])] == []


@pytest.mark.parametrize(
    "choices",
    [
        {"method": "S_2"},
        {"method": "tdq-thin", "module_start": "steps", "zero_point": "own"},
        {"method": "tdq", "module_start": "as-is", "rounding": "learned"},
        {"method": "dynamic"},
        {"method": "dynamic-statistics-time", "module_start": "as-is"},
        {
            "method": "step-lsq",
            "interval_parameter": "log",
            "weight_granularity": "per_tensor",
            "rounding": "gptq",
            "activation_range": "ema",
        },
        {"method": "static", "compute_dtype": "bfloat16", "weight_lr": 1.0, "interval_lr": 1.0},
    ],
    ids=lambda c: c["method"],
)
def test_no_unit_ends_worse_than_it_began(wrap: Wrap, choose: Choose, calls: Calls, choices: Any) -> None:
    config = choose(**choices)
    quantized = wrap(config)
    reports = run(quantized, calls, config)
    units = quantized.units()
    assert [r.unit for r in reports] == units * 2
    assert [r.index for r in reports] == [*range(len(units))] * 2
    assert {r.total for r in reports} == {len(units)}
    assert all(r.after <= r.before for r in reports), [r for r in reports if r.after > r.before]
    for layer in quantized.layers().values():
        for weight in layer.weight_quantizers():
            assert weight.rounding is None and weight.codes is not None
            assert weight.codes.max() <= 2**3 - 1 and weight.codes.unique().numel() > 1
    for quantizer in quantized.quantizers().values():
        if quantizer.record.method.startswith("dynamic"):
            assert isinstance(quantizer.source, Dynamic) and not quantizer.source.training
            assert not any(p.requires_grad for p in quantizer.source.parameters())
        else:
            assert isinstance(quantizer.source, TableSource)
            scale, zero_point = quantizer.source.scale, quantizer.source.zero_point
            assert scale.shape == zero_point.shape == (T + 1,) and bool((scale > 0).all() and scale.isfinite().all())
            assert zero_point.min() >= 0 and zero_point.max() <= quantizer.qtype.qmax
    output = quantized(**calls.inputs(slice(0, 12))).sample
    assert bool(output.isfinite().all())


def test_learning_helps_against_nearest_rounding(wrap: Wrap, choose: Choose, calls: Calls) -> None:
    """Same data for learning and for the loss: the sum over all units must fall."""
    config = choose(
        weight_iterations=20, weight_lr=0.1, activation_iterations=16, interval_lr=2e-2, interval_parameter="log"
    )
    reports = run(wrap(config), calls, config)
    for phase in ("weights", "activations"):
        mine = [r for r in reports if r.phase == phase]
        assert sum(r.after < r.before for r in mine) > len(mine) / 2


def test_closed_form_rounding_helps_against_nearest_rounding(wrap: Wrap, choose: Choose, calls: Calls) -> None:
    """It sees the correlations of the inputs, and what the layers before have lost."""
    config = choose(rounding="gptq", activation_iterations=0, bias_lr=1e-3, weight_granularity="per_channel")
    reports = [r for r in run(wrap(config), calls, config) if r.phase == "weights"]
    assert sum(r.after for r in reports) < 0.7 * sum(r.before for r in reports)
    assert sum(r.after < r.before for r in reports) > 0.8 * len(reports)


def test_the_reported_weight_loss_is_that_of_the_quantized_prefix(wrap: Wrap, choose: Choose, calls: Calls) -> None:
    """The last layer's loss, recomputed by plain forward passes: its target is the full-precision model's output."""
    config = choose(rounding="nearest")
    quantized = wrap(config)
    reports = run(quantized, calls, config)
    inputs = calls.inputs(slice(0, 12))
    quantized.quantize(weights=False, activations=False)
    target = quantized(**inputs).sample
    quantized.quantize(weights=True, activations=False)
    expected = (quantized(**inputs).sample - target).square().sum(1).mean().item()
    last = [r for r in reports if r.phase == "weights"][-1]
    assert last.unit == "conv_out" and last.after == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("symmetric", "bits"), [("never", set()), ("8-bit", {8}), ("always", {4, 8})])
def test_symmetric_weights_have_the_middle_code_as_zero_point(
    wrap: Wrap, choose: Choose, calls: Calls, symmetric: str, bits: set[int]
) -> None:
    layers = {"eight_bit_layers": "first,last", "weight_symmetric": symmetric}
    config = choose(scheme="W4A8", rounding="nearest", method="step-table", **layers)
    quantized = wrap(config)
    run(quantized, calls, config)
    found: dict[int, set[int]] = {4: set(), 8: set()}
    for layer in quantized.layers().values():
        for weight in layer.weight_quantizers():
            assert weight.zero_point is not None and weight.codes is not None
            found[weight.qtype.bits] |= set(weight.zero_point.tolist())
            if symmetric == "8-bit" and weight.qtype.bits == 8:
                codes = weight.codes.int() - weight.zero_point.view(-1, *(1,) * (weight.codes.ndim - 1))
                assert torch.equal(codes, codes.to(torch.int8).int())
    assert {b for b, zero_points in found.items() if zero_points == {1 << (b - 1)}} == bits


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_in_an_activation_names_the_layer_and_t(wrap: Wrap, choose: Choose, calls: Calls, bad: float) -> None:
    config = choose()
    quantized = wrap(config)
    calls.groups[0].leaf("sample")[4, 0, 1, 2] = bad  # row 4 has t = 500
    with pytest.raises(NonFiniteError, match=r"conv_in .*t = 500\b"):
        run(quantized, calls, config)


class Stop(Exception):
    pass


@pytest.mark.parametrize(("method", "fraction"), [("S_2", 0.3), ("tdq-thin", 1.4), ("dynamic-statistics", 1.6)])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    wrap: Wrap, choose: Choose, calls: Calls, tmp_path: Path, method: str, fraction: float
) -> None:
    rounding, start = ("learned", "steps") if method == "tdq-thin" else ("adaround", "as-is")
    few = {"weight_iterations": 2, "activation_iterations": 2, "activation_range": "minmax", "weight_range": "minmax"}
    config = choose(method=method, bias_lr=1e-3, rounding=rounding, module_start=start, **few)
    whole = wrap(config)
    expected = run(whole, calls, config)
    total = len(whole.units())
    stop_after = int(fraction * total)
    seen: list[UnitReport] = []

    def on_unit(report: UnitReport) -> None:
        seen.append(report)
        if len(seen) == stop_after:
            raise Stop

    identity = {"model": "m", "scheme": config.scheme}
    with pytest.raises(Stop):
        reconstruct(wrap(config), calls, config, run=RunDirectory(tmp_path, identity), on_unit=on_unit)
    resumed = wrap(config)
    reports = run(resumed, calls, config, run=RunDirectory(tmp_path, identity))
    assert [r.seconds == 0 for r in reports] == [True] * stop_after + [False] * (2 * total - stop_after)
    assert [(r.unit, r.before, r.after) for r in reports] == [(r.unit, r.before, r.after) for r in expected]
    assert_same(state(resumed), state(whole))


def test_two_runs_are_equal_and_another_seed_is_not(wrap: Wrap, choose: Choose, calls: Calls) -> None:
    found = []
    for seed in (0, 0, 1):
        config = choose(seed=seed, weight_iterations=6, weight_lr=0.3, skip="mid_block.*,down_blocks.*")
        quantized = wrap(config)
        torch.manual_seed(len(found))  # the run owes nothing to the global generator
        run(quantized, calls, config)
        found.append(state(quantized))
    assert_same(found[0], found[1])
    assert any(not torch.equal(found[0][k], found[2][k]) for k in found[0])


@pytest.mark.parametrize("now", [{"model": "other", "seed": 0}, {"model": "m", "seed": 1}, {"model": "m"}])
def test_another_run_in_the_folder_is_an_error_that_names_the_key(tmp_path: Path, now: dict[str, Any]) -> None:
    before = {"model": "m", "seed": 0}
    RunDirectory(tmp_path, before)
    key = next(k for k in before if before[k] != now.get(k))
    with pytest.raises(ResumeError, match=rf"another {key} \({before[key]!r}, now {now.get(key)!r}\)"):
        RunDirectory(tmp_path, now)
    RunDirectory(tmp_path, before)


def test_rounding_is_learned_in_both_halves_of_a_split_shortcut(wrap: Wrap, choose: Choose, calls: Calls) -> None:
    """The public Q-Diffusion code forgets the second half (method section 3.7)."""
    config = choose(
        weight_iterations=200, weight_lr=3e-2, rounding_warmup=0.0, rounding_loss=1.0, weight_granularity="per_channel"
    )
    quantized = wrap(config)
    name = "up_blocks.0.resnets.0.conv_shortcut"
    layer = quantized.layers()[name]
    assert len(layer.ranges) == 2
    shape = (12, layer.ranges[-1][1], 4, 4)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    unit = Unit(name, layer, calls.t)
    call = call_of(name, x)
    target = unit.outputs(call)
    began: list[list[Tensor]] = []
    decided: list[list[Tensor]] = []

    def watch(module: Any, args: Any, output: Any) -> None:
        roundings = [w.rounding for w in layer.weight_quantizers()]
        if all(r is not None for r in roundings):
            now = [r.alpha.detach().clone() for r in roundings if r is not None]
            began.append(now) if not began else None
            decided[:] = [[r.h().detach().clone() for r in roundings if r is not None]]

    handle = layer.register_forward_hook(watch)
    result = reconstruct_weights(unit, call, call, target, config, torch.Generator().manual_seed(0))
    handle.remove()
    assert result.after <= result.before
    for half in range(2):
        h = decided[0][half]
        # without the regularizer they would stay between 0 and 1, as they began
        undecided = ((h > 0.01) & (h < 0.99)).float().mean()
        at_first = torch.sigmoid(began[0][half]) * 1.2 - 0.1
        assert undecided < 0.1 < ((at_first > 0.01) & (at_first < 0.99)).float().mean()


@pytest.mark.parametrize("power", [2.0, 2.4])
def test_the_loss_sums_over_channels_and_averages_the_rest(power: float) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    expected = sum(value**power for value in (a - b).abs().flatten().tolist())
    assert reconstruction_loss([a], [b], power).item() == pytest.approx(expected / (2 * 4 * 5), rel=1e-5)
    assert LOSS_POWER == 2.0
    both = reconstruction_loss([a, a], [b, 2 * b], power)
    torch.testing.assert_close(both, sum(reconstruction_loss([a], [other], power) for other in (b, 2 * b)))


def test_published_presets_keep_the_biases(wrap: Wrap, choose: Choose, calls: Calls) -> None:
    quantized = wrap(choose())
    original = {name: layer.bias.clone() for name, layer in quantized.layers().items() if layer.bias is not None}
    run(quantized, calls, choose())
    quantized.finalize()
    assert original and all(torch.equal(quantized.layers()[name].bias, bias) for name, bias in original.items())


def test_learned_biases_are_part_of_the_final_layer(wrap: Wrap, choose: Choose, calls: Calls) -> None:
    config = choose(bias_lr=1e-3, weight_iterations=20)
    quantized = wrap(config)
    original = {name: layer.bias.clone() for name, layer in quantized.layers().items() if layer.bias is not None}
    run(quantized, calls, config)
    shift = {name: layer.shift.detach().clone() for name, layer in quantized.layers().items() if name in original}
    before = quantized(**calls.inputs(slice(0, 4))).sample
    quantized.finalize()
    assert any(bool(value.any()) for value in shift.values())
    for name, bias in original.items():
        assert torch.equal(quantized.layers()[name].bias, bias + shift[name])
    assert torch.equal(quantized(**calls.inputs(slice(0, 4))).sample, before)


def test_blocks_of_phase_a_see_the_inputs_that_were_asked_for(wrap: Wrap, choose: Choose, calls: Calls) -> None:
    found: dict[str, dict[str, Tensor]] = {}
    for inputs in ("quantized", "full-precision"):
        config = choose(activation_inputs=inputs, method="static", activation_iterations=0)
        run(quantized := wrap(config), calls, config)
        found[inputs] = {name: static.scale for name, static in quantized.static.items()}
    mine, full = found["quantized"], found["full-precision"]
    first, *_, last = mine
    assert torch.equal(mine[first], full[first])  # nothing is quantized before it
    assert not torch.equal(mine[last], full[last])


def test_relative_loss_weights_change_what_is_learned(wrap: Wrap, choose: Choose, calls: Calls) -> None:
    found = []
    for weights in ("uniform", "relative"):
        config = choose(loss_weights=weights)
        run(quantized := wrap(config), calls, config)
        found.append(state(quantized))
    assert any(not torch.equal(found[0][key], found[1][key]) for key in found[0])


class Greedy(torch.autograd.Function):
    """The checkpoint of guided-diffusion, which asks for the gradients of all parameters."""

    @staticmethod
    def forward(ctx: Any, run: Callable[..., Tensor], x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.run, ctx.x, ctx.parameters = run, x, parameters
        return run(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        x = ctx.x.detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.run(x)
        return None, *torch.autograd.grad(y, (x, *ctx.parameters), gradients, allow_unused=True)


class Block(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.a, self.b = kind, nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = {
            "none": self.run,
            "reentrant": partial(checkpoint, self.run, use_reentrant=True),
            "greedy": lambda x: Greedy.apply(self.run, x, *self.parameters()),
        }[self.kind](x)
        return x + found

    def run(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(self.a(x).tanh())
        return y


class Checkpointed(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.time, self.blocks = nn.Linear(1, 8), nn.ModuleList(Block(kind) for _ in range(2))

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        for block in self.blocks:
            sample = block(sample + self.time(timestep.view(-1, 1) / 1000))
        return sample


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_blocks_with_checkpoints_that_compute_without_gradients_learn(choose: Choose) -> None:
    x, t = torch.randn(8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([900.0, 100.0]).repeat(4)
    found = []
    for kind, iterations in (("none", 4), ("reentrant", 4), ("greedy", 4), ("greedy", 0)):
        model, config = Checkpointed(kind), choose(activation_iterations=iterations)
        tables = calibrate(model, config, calls_of(model, x, t)).to_artifact().tables
        found.append(torch.cat([table.scale.flatten() for table in tables.values() if table.scale is not None]))
    plain, reentrant, greedy, start = found
    assert torch.equal(reentrant, plain)
    assert ((greedy != start) >= (plain != start)).all() and bool((plain != start).any())
