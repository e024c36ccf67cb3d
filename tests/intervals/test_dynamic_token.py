"""Intervals of tokens: from each one's own range, times a ratio of t."""

from __future__ import annotations

import pytest
import torch
from observed import STEPS, T
from torch import Tensor

from ptq_tdq.affine import fake_quantize
from ptq_tdq.errors import ModelError
from ptq_tdq.intervals import Observed, source_class
from ptq_tdq.intervals.dynamic import Dynamic, restore_dynamic
from ptq_tdq.modules import ActivationQuantizer
from ptq_tdq.observe import Observer
from ptq_tdq.records import QuantizerRecord
from ptq_tdq.scheme import QType
from ptq_tdq.search import ratio_errors
from ptq_tdq.timeaxis import at

RATIOS = ("dynamic-token-static", "dynamic-token-table", "dynamic-token-tdq")


def tokens(t: Tensor) -> Tensor:
    """[B, 16, 64], each token of its own size; at large t of a normal distribution, at small t of two values."""
    generator = torch.Generator().manual_seed(0)
    size = torch.logspace(-2, 2, 16)[:, None]
    normal = torch.randn(len(t), 16, 64, generator=generator)
    return size * torch.where((t > T / 2)[:, None, None], normal, normal.sign())


def build(method: str, bits: int = 3) -> Dynamic:
    torch.manual_seed(0)
    observer = Observer("layer", STEPS, vectors=QType(bits))
    observer.see(tokens(STEPS), STEPS)
    observer.start_counting()
    observer.see(tokens(STEPS), STEPS)
    observed = Observed(T, STEPS, observer.histogram(), QType(bits), ratios=observer.ratios())
    source = source_class(method).build(method, observed).eval()
    assert isinstance(source, Dynamic)
    return source


def error(source: Dynamic, t: Tensor, bits: int = 3) -> float:
    x = tokens(t)
    scale, zero_point = source(t, x)
    off = fake_quantize(x, scale[..., None], zero_point[..., None], QType(bits)) - x
    return (off.square().sum(-1) / x.square().sum(-1)).mean().item()


@pytest.mark.parametrize("bits", [4, 8])
def test_each_token_is_quantized_as_if_it_were_alone(bits: int) -> None:
    x = tokens(STEPS)
    scale, zero_point = build("dynamic-token", bits)(STEPS, x)
    assert scale.shape == zero_point.shape == x.shape[:-1]
    lo, hi = (x.amin(-1), x.amax(-1))
    torch.testing.assert_close(scale * (2**bits - 1), hi.clamp(min=0) - lo.clamp(max=0))
    off = fake_quantize(x, scale[..., None], zero_point[..., None], QType(bits)) - x
    assert bool((off.abs() <= scale[..., None] * 1.0001).all()), "half a step, and half of one from the zero point"


@pytest.mark.parametrize("method", RATIOS)
def test_ratios_start_with_less_error_than_the_whole_range(method: str) -> None:
    normal = STEPS[STEPS > T / 2]
    assert error(build(method), normal) < 0.95 * error(build("dynamic-token"), normal)


@pytest.mark.parametrize("method", ["dynamic-token-table", "dynamic-token-tdq"])
def test_ratios_follow_what_is_worth_clipping_at_each_step(method: str) -> None:
    """Two values need no clipping, and would lose by it; a normal distribution in 3 bits gains."""
    source = build(method)
    ratio = source.ratio.table(T)[0]  # type: ignore[union-attr,operator]
    assert ratio[100] > 0.95 > 0.9 > ratio[900]
    assert error(source, STEPS) < error(build("dynamic-token-static"), STEPS)


def test_the_ratio_tried_is_a_factor_of_the_scale() -> None:
    x, qtype = tokens(STEPS[:2]), QType(4)
    scale, zero_point = (v[..., None] for v in build("dynamic-token", bits=4)(STEPS[:2], x))
    expected = (fake_quantize(x, scale * 0.5, zero_point, qtype) - x).abs().pow(2.4).mean((1, 2))
    torch.testing.assert_close(ratio_errors(x, qtype, torch.tensor(1.0))[:, 10], expected)


def test_a_row_of_zeros_and_huge_values_have_finite_intervals() -> None:
    x = torch.stack([torch.zeros(8), torch.full((8,), 1e38), torch.full((8,), -1e-38)])[None]
    for method in ("dynamic-token", *RATIOS):
        scale, _ = build(method)(torch.tensor([500.0]), x)
        assert bool((torch.isfinite(scale) & (scale > 0)).all())


@pytest.mark.parametrize("method", RATIOS)
def test_a_frozen_source_is_restored_from_its_table_alone(method: str) -> None:
    source = build(method)
    source.freeze(T)
    kept = source.generator
    assert {key: tuple(value.shape) for key, value in kept.items()} == {"ratio": (T + 1,)}
    restored = restore_dynamic(method, source.zero_point, QType(3), kept, T + 1)
    for ours, theirs in zip(restored(STEPS, tokens(STEPS)), source(STEPS, tokens(STEPS)), strict=True):
        assert torch.equal(ours, theirs)
    with pytest.raises(ModelError, match=f"'{method}'"):
        restore_dynamic(method, source.zero_point, QType(3), {"ratio": kept["ratio"][1:]}, T + 1)


@pytest.mark.parametrize("along", [-1, -2, None])
def test_a_token_is_what_the_operation_sums_over(along: int | None) -> None:
    """Scaling one token leaves the codes of all others as they are."""
    quantizer = ActivationQuantizer(QuantizerRecord("x", 3, "dynamic-token", "mse"), along)
    quantizer.source, quantizer.enabled = build("dynamic-token"), True
    x = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    scaled = x.clone()
    one = {-1: (1, 2, 3), -2: (1, 2, slice(None), 3), None: (1,)}[along]
    scaled[one] *= 4  # a power of two: the same codes
    with at(torch.tensor([500.0])):
        before, after = quantizer(x), quantizer(scaled)
    before[one] *= 4
    assert torch.equal(before, after)


def test_ratios_of_unseen_steps_are_those_of_the_nearest() -> None:
    observer = Observer("layer", STEPS, vectors=QType(4))
    seen = STEPS[[0, -1]]
    for _ in range(2):
        observer.see(tokens(seen), seen)
        if observer.counts is None:
            observer.start_counting()
    found = observer.ratios()
    assert torch.equal(found.counts[1], found.counts[0]) and torch.equal(found.counts[-2], found.counts[-1])
    assert not torch.equal(found.counts[0], found.counts[-1])
