"""Sources that find the interval at run time: from the absolute maximum, or by a network of statistics."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from observed import STEPS, T, activation, observe, watch
from observed import build as build_from
from torch import Tensor

from ptq_tdq.affine import fake_quantize
from ptq_tdq.errors import ModelError
from ptq_tdq.intervals import IntervalSource, source_class
from ptq_tdq.intervals.dynamic import restore_dynamic
from ptq_tdq.scheme import QType

NETWORKS = ("dynamic-statistics", "dynamic-statistics-time")


def build(method: str, bits: int = 8, **options: Any) -> IntervalSource:
    return build_from(method, observe(bits=bits, **options))


@pytest.mark.parametrize("bits", [4, 8])
def test_dynamic_clips_nothing_and_uses_the_whole_range(bits: int) -> None:
    source = build("dynamic", bits)
    torch.manual_seed(1)
    x = torch.randn(6, 3, 4, 4) * torch.logspace(-2, 2, 6).view(6, 1, 1, 1) + 0.1
    scale, zero = source(torch.zeros(6), x)
    codes = x.flatten(1) / scale[:, None] + zero[:, None]
    top = 2**bits - 1
    assert scale.shape == zero.shape == (6,) and zero.unique().numel() == 1
    assert codes.min() >= -1e-3 and codes.max() <= top + 1e-3
    reached = (codes.amin(1).abs() < 1e-3) | ((codes.amax(1) - top).abs() < 1e-3)
    assert bool(reached.all())


def test_dynamic_is_abs_max_for_a_symmetric_zero_point() -> None:
    source = source_class("dynamic")(torch.tensor(0), QType(8, signed=True))  # type: ignore[call-arg]
    x = torch.tensor([[3.0, -1.0], [1.0, -8.0]])
    assert source(torch.zeros(2), x)[0].tolist() == pytest.approx([3 / 127, 8 / 128])


@pytest.mark.parametrize("method", ["dynamic", *NETWORKS])
def test_dynamic_sources_are_not_functions_of_time(method: str) -> None:
    assert not source_class(method).timed
    assert source_class("tdq").timed


def test_a_dynamic_scale_for_zeros_is_positive() -> None:
    assert (build("dynamic")(torch.zeros(2), torch.zeros(2, 5))[0] > 0).all()


# networks


def test_the_network_reads_four_statistics_and_the_time_encoding() -> None:
    widths = {method: build(method, module_start="as-is").net[0].in_features for method in NETWORKS}  # type: ignore[union-attr,index]
    assert widths == {"dynamic-statistics": 4, "dynamic-statistics-time": 4 + 128}


def test_the_statistics_are_minimum_maximum_mean_and_variance_in_units_of_the_static_range() -> None:
    source = build("dynamic-statistics", bits=8)
    x = activation(STEPS)
    found = source.features(STEPS, torch.stack([x.amin(1), x.amax(1), x.mean(1), x.var(1, correction=0)], 1))  # type: ignore[operator]
    seen: list[Tensor] = []
    source.net.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))  # type: ignore[union-attr]
    source(STEPS, x)
    torch.testing.assert_close(seen[0], found)
    scaled = build_from("dynamic-statistics", watch(8 * x, STEPS, 8))
    scaled.net.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))  # type: ignore[union-attr]
    scaled(STEPS, 8 * x)
    torch.testing.assert_close(seen[1], seen[0])


@pytest.mark.parametrize("zero_point", ["fixed", "own"])
@pytest.mark.parametrize("method", NETWORKS)
def test_a_network_starts_with_less_error_than_the_static_interval(method: str, zero_point: str) -> None:
    """On 8 samples of each step, whose mean drifts: the zero point in use is the static one whatever the choice."""
    t = STEPS.repeat_interleave(8)
    noise = torch.randn(len(t), 200, generator=torch.Generator().manual_seed(1))
    x = (0.3 + 1.5 * t / T)[:, None] * (noise + 2 * (t / T)[:, None])
    observed = watch(x, t, 6, module_start="steps", zero_point=zero_point)
    torch.manual_seed(0)
    started = source_class(method).build(method, observed).eval()(t, x)
    static = (value.expand(len(t)) for value in (observed.static.scale, observed.static.zero_point))

    def error(scale: Tensor, zero: Tensor) -> float:
        return (fake_quantize(x, scale[:, None], zero[:, None], QType(6)) - x).square().mean().item()

    assert error(*started) < 0.9 * error(*static)


def test_with_zero_weights_a_network_starts_as_the_static_interval() -> None:
    source, static = build("dynamic-statistics", module_start="as-is", module_weights="zero"), observe(bits=8).static
    scale, zero_point = source(STEPS, activation(STEPS))
    torch.testing.assert_close(scale, static.scale.expand(len(STEPS)))
    assert bool((zero_point == static.zero_point).all())


@pytest.mark.parametrize("method", NETWORKS)
def test_each_sample_has_its_own_interval_which_follows_t_in_one_variant_only(method: str) -> None:
    source, x = build(method, module_start="as-is"), activation(torch.tensor([100.0, 900.0]))
    both = source(torch.tensor([5, 5]), x)[0]
    torch.testing.assert_close(source(torch.tensor([5]), x[1:])[0], both[1:])
    assert both[0] != both[1]
    moved = source(torch.tensor([5, 800]), x)[0]
    assert moved[0] == both[0]
    assert (moved[1] == both[1]) == (method == "dynamic-statistics")


@pytest.mark.parametrize("method", NETWORKS)
def test_gradients_reach_the_network_and_not_the_tensor(method: str) -> None:
    source, x = build(method, module_start="as-is"), activation(STEPS).requires_grad_()
    source(STEPS, x)[0].sum().backward()
    assert all(p.grad is not None and bool((p.grad != 0).any()) for p in source.parameters())
    assert x.grad is None and source.raw_parameters() == []


@pytest.mark.parametrize("method", NETWORKS)
def test_what_is_kept_of_a_network_restores_it(method: str) -> None:
    source, x = build(method), activation(STEPS)
    state = torch.random.get_rng_state()
    restored = restore_dynamic(method, source.zero_point, QType(8), source.generator, T + 1)  # type: ignore[arg-type]
    assert torch.equal(torch.random.get_rng_state(), state)
    for ours, theirs in zip(restored.half()(STEPS, x), source(STEPS, x), strict=True):
        assert torch.equal(ours, theirs)  # half(): intervals stay float32
    halves = {name: tensor.half() for name, tensor in source.generator.items()}  # type: ignore[union-attr]
    for wrong in ({"net.0.weight": torch.zeros(3)}, halves):
        with pytest.raises(ModelError, match=f"'{method}'"):
            restore_dynamic(method, torch.tensor(3), QType(8), wrong, T + 1)
