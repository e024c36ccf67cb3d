"""Closed-form rounding: against rounding to nearest, every possible rounding, and least squares by numpy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ptq_tdq.affine import quantize
from ptq_tdq.gptq import DAMPING, compensated, gptq, layer_error, nearest, solve_order
from ptq_tdq.scheme import QType


def rounded(
    weight: torch.Tensor, hessian: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, qtype: QType
) -> torch.Tensor:
    """Codes with a scale of its own for each weight, whose errors are as they are said to be."""
    hessian = hessian.double()
    (codes,), (errors,) = gptq(weight, solve_order(hessian), scale[None], zero_point, qtype)
    lost = weight - (codes - zero_point) * scale.double()
    within = 1e-6 * (lost.square() @ (hessian.diagonal() + (hessian.diagonal() == 0)))
    assert bool(((errors - layer_error(lost, hessian)).abs() <= within).all())
    return codes


def correlated(samples: int, columns: int) -> torch.Tensor:
    return torch.randn(samples, columns) @ (torch.eye(columns) + 0.5 * torch.rand(columns, columns))


def test_independent_inputs_give_rounding_to_nearest() -> None:
    torch.manual_seed(0)
    weight, qtype = torch.randn(5, 100), QType(4)
    scale, zero = torch.rand(5, 1).expand(5, 100) * 0.2 + 0.1, torch.randint(4, 12, (5, 1)).expand(5, 100)
    codes = rounded(weight, torch.diag(torch.rand(100) + 0.1), scale, zero, qtype)
    assert torch.equal(codes.int(), quantize(weight, scale, zero, qtype))


def test_it_is_close_to_the_best_of_all_roundings_and_nearest_is_not() -> None:
    torch.manual_seed(2)
    qtype, scale, zero = QType(3), torch.full((1, 10), 0.5), torch.full((1, 10), 4)
    ratios = []
    for _ in range(9):
        weight, x = torch.randn(1, 10) * 0.7, correlated(64, 10)
        hessian = x.t() @ x / 64

        def loss(codes: np.ndarray, x=x, weight=weight) -> float:
            return float(np.square(((codes - 4) * 0.5 - weight.double().numpy()) @ x.double().numpy().T).mean())

        floor = np.floor(weight.double().numpy() / 0.5) + 4
        best = min(loss(np.clip(floor + np.array(up), 0, 7)) for up in itertools.product((0, 1), repeat=10))
        nearest = loss(quantize(weight, scale, zero, qtype).double().numpy())
        codes = rounded(weight, hessian, scale, zero, qtype)
        assert bool(((codes >= 0) & (codes <= 7) & (codes == codes.round())).all())
        mine = loss(codes.double().numpy())
        error = layer_error(weight - (codes - zero) * scale, hessian)
        assert error.item() == pytest.approx(mine, rel=1e-3)
        ratios.append((mine / best, nearest / best))
    mine_ratio, nearest_ratio = np.median(ratios, axis=0)
    assert mine_ratio < 1.5 < nearest_ratio, ratios


def test_codes_are_those_of_the_published_recursion() -> None:
    """Frantar et al., algorithm 1, in numpy: columns one after the other, by the Cholesky factor of the inverse."""
    torch.manual_seed(1)
    qtype, weight, x = QType(4), torch.randn(5, 90).double(), correlated(300, 90).double()
    hessian, scale, zero = x.t() @ x / 300, torch.rand(5, 1).expand(5, 90) * 0.2 + 0.1, torch.full((5, 90), 8)
    order = np.argsort(-hessian.diagonal().numpy(), kind="stable")
    h = hessian.numpy()[np.ix_(order, order)]
    upper = np.linalg.cholesky(np.linalg.inv(h + DAMPING * np.diag(np.diag(h)))).T
    w, s, expected = weight.numpy()[:, order].copy(), scale.double().numpy(), np.empty((5, 90))
    for k in range(90):
        code = np.clip(np.rint(w[:, k] / s[:, k]) + 8, 0, 15)
        expected[:, order[k]] = code
        error = (w[:, k] - (code - 8) * s[:, k]) / upper[k, k]
        w[:, k:] -= error[:, None] * upper[k, k:]
    np.testing.assert_array_equal(rounded(weight, hessian, scale, zero, qtype).numpy(), expected)


def test_rows_and_the_order_of_columns_do_not_matter() -> None:
    torch.manual_seed(3)
    qtype, weight, x = QType(3), torch.randn(6, 130), correlated(400, 130)
    hessian, scale, zero = x.t() @ x / 400, torch.full((6, 130), 0.4), torch.full((6, 130), 4)
    codes = rounded(weight, hessian, scale, zero, qtype)
    order = torch.randperm(130)
    again = rounded(weight[:, order].flip(0), hessian[order][:, order], scale, zero, qtype)
    assert (again.flip(0) != codes[:, order]).float().mean() < 0.02  # sums in another order decide a few ties


def test_the_compensated_weight_is_the_least_squares_solution() -> None:
    rng = np.random.default_rng(0)
    full, weight = rng.normal(size=(300, 8)), rng.normal(size=(3, 8))
    seen = full + 0.3 * rng.normal(size=full.shape)  # what the quantized layers before it have left
    expected = np.linalg.lstsq(seen, full @ weight.T, rcond=None)[0].T
    hessian = torch.from_numpy(seen.T @ seen / 300)
    cross = torch.from_numpy(weight @ (full - seen).T @ seen / 300)
    found = compensated(torch.from_numpy(weight), hessian, cross, 1e-12)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)
    strong = compensated(torch.from_numpy(weight), hessian, cross, 1e12)
    np.testing.assert_allclose(strong.numpy(), weight, rtol=1e-6)


def test_inputs_that_never_vary_give_rounding_to_nearest() -> None:
    weight, scale, zero = torch.randn(2, 4), torch.full((2, 4), 0.3), torch.full((2, 4), 8)
    zeros = torch.zeros(4, 4)
    assert torch.equal(compensated(weight, zeros, torch.zeros(2, 4), 0.1), weight)
    assert torch.equal(rounded(weight, zeros, scale, zero, QType(4)).int(), quantize(weight, scale, zero, QType(4)))


Case = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, QType]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A weight, its grid and positive semidefinite H: of any rank, with dead and repeated channels, of any size."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 32)))
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 70))
    x = torch.randn(draw(st.integers(1, 90)), columns, generator=generator, dtype=torch.float64)
    kind = draw(st.sampled_from(["zero", "rank 1", "repeated", "dead", "constant", "plain"]))
    if kind == "zero":
        x.zero_()
    elif kind == "rank 1":
        x = x[:1].expand_as(x)
    elif kind == "repeated":
        x = x[:, torch.randint(columns, (columns,), generator=generator)]
    elif kind == "dead":
        x[:, torch.rand(columns, generator=generator) < 0.5] = 0
    elif kind == "constant":
        x = torch.ones_like(x)
    powers = torch.rand(columns, generator=generator) * draw(st.integers(0, 30))  # channels of unlike sizes
    x = x * 10.0**powers * 10.0 ** draw(st.integers(-30, 30))
    bits = draw(st.integers(2, 8))
    weight = torch.randn(rows, columns, generator=generator)
    scale = torch.rand(rows, columns, generator=generator) * draw(st.sampled_from([1e-3, 0.1, 10.0])) + 1e-4
    zero_point = torch.randint(0, 1 << bits, (rows, columns), generator=generator)
    return weight, x.t() @ x / len(x), scale, zero_point, QType(bits)


@settings(deadline=None, max_examples=200)
@given(cases())
def test_every_positive_semidefinite_hessian_gives_codes_in_range(case: Case) -> None:
    weight, hessian, scale, zero_point, qtype = case
    codes = rounded(weight, hessian, scale, zero_point, qtype)
    assert codes.shape == weight.shape and bool((codes == codes.round()).all())
    assert codes.min() >= qtype.qmin and codes.max() <= qtype.qmax
    assert bool(layer_error(weight - (codes - zero_point) * scale, hessian).isfinite().all())


@settings(deadline=None, max_examples=100)
@given(cases())
def test_without_clipping_the_error_keeps_babais_bound(case: Case) -> None:
    """In the damped H, at most ``sum (s_k L_kk / 2)^2``; and that is at most ``sum (s_k / 2)^2 H_kk``."""
    weight, hessian, scale, _, qtype = case
    wide = scale * 1e6
    order, lower, _ = solve_order(hessian)
    middle = torch.full(weight.shape, 1 << (qtype.bits - 1))
    codes = rounded(weight, hessian, wide, middle, qtype)
    inside = ((codes > qtype.qmin) & (codes < qtype.qmax)).all(1)  # these rows were not clipped
    damped = hessian.clone()
    damped.diagonal().mul_(1 + DAMPING)
    damped.diagonal()[hessian.diagonal() == 0] = 1 + DAMPING
    error = layer_error(weight - (codes - middle) * wide, damped)
    bound = (wide[:, order] / 2 * lower.diagonal()).square().sum(1)
    assert bool((error[inside] <= bound[inside] * (1 + 1e-6)).all())
    assert bool((bound <= ((wide.double() / 2).square() * damped.diagonal()).sum(1) * (1 + 1e-6)).all())


@settings(deadline=None, max_examples=50)
@given(cases(), st.integers(0, 1 << 32))
def test_the_unit_of_a_channel_does_not_matter(case: Case, seed: int) -> None:
    """x_k times a power of two, and W_k by as much less, is the same layer: so is its compensation."""
    weight, hessian, *_ = case
    unit = 2.0 ** torch.randint(-20, 20, (weight.shape[1],), generator=torch.Generator().manual_seed(seed)).double()
    cross = 0.1 * weight.double() @ hessian
    plain = compensated(weight, hessian, cross, 0.3)
    scaled = compensated(weight / unit, hessian * unit[:, None] * unit, cross * unit, 0.3)
    torch.testing.assert_close(scaled * unit, plain, rtol=1e-6, atol=0)


def test_a_huge_channel_does_not_drown_the_others() -> None:
    torch.manual_seed(5)
    qtype, weight, x = QType(4), torch.randn(6, 40), correlated(300, 40).double()
    scale, zero = torch.full((6, 41), 0.3), torch.full((6, 41), 8)
    alone = rounded(weight, x.t() @ x, scale[:, 1:], zero[:, 1:], qtype)
    hessian = torch.block_diag(torch.tensor([[1e76]], dtype=torch.float64), x.t() @ x)
    both = rounded(torch.cat([torch.ones(6, 1), weight], 1), hessian, scale, zero, qtype)
    assert torch.equal(both[:, 1:], alone)
    assert not torch.equal(alone, nearest(weight, scale[:, 1:], zero[:, 1:], qtype))


@settings(deadline=None, max_examples=100)
@given(cases(), st.floats(1e-6, 1e6))
def test_compensation_is_finite_and_leaves_dead_channels(case: Case, damping: float) -> None:
    weight, hessian, *_ = case
    cross = 0.1 * weight.double() @ hessian  # what inputs that are all 10% too small lose
    found = compensated(weight, hessian, cross, damping)
    assert bool(found.isfinite().all())
    dead = hessian.diagonal() == 0
    assert torch.equal(found[:, dead], weight[:, dead].double())
