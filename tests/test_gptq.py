"""Closed-form rounding: against rounding to nearest, every possible rounding, and least squares by numpy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from ptq_tdq.affine import quantize
from ptq_tdq.gptq import compensated, gptq, layer_error, solve_order
from ptq_tdq.scheme import QType


def correlated(samples: int, columns: int) -> torch.Tensor:
    return torch.randn(samples, columns) @ (torch.eye(columns) + 0.5 * torch.rand(columns, columns))


def test_independent_inputs_give_rounding_to_nearest() -> None:
    torch.manual_seed(0)
    weight, qtype = torch.randn(5, 100), QType(4)
    scale, zero = torch.rand(5, 1).expand(5, 100) * 0.2 + 0.1, torch.randint(4, 12, (5, 1)).expand(5, 100)
    codes = gptq(weight, *solve_order(torch.diag(torch.rand(100) + 0.1)), scale, zero, qtype)
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
        codes = gptq(weight, *solve_order(hessian), scale, zero, qtype)
        assert bool(((codes >= 0) & (codes <= 7) & (codes == codes.round())).all())
        mine = loss(codes.double().numpy())
        error = layer_error(weight - (codes - zero) * scale, hessian)
        assert error.item() == pytest.approx(mine, rel=1e-3)
        ratios.append((mine / best, nearest / best))
    mine_ratio, nearest_ratio = np.median(ratios, axis=0)
    assert mine_ratio < 1.5 < nearest_ratio, ratios


def test_rows_and_the_order_of_columns_do_not_matter() -> None:
    torch.manual_seed(3)
    qtype, weight, x = QType(3), torch.randn(6, 130), correlated(400, 130)
    hessian, scale, zero = x.t() @ x / 400, torch.full((6, 130), 0.4), torch.full((6, 130), 4)
    codes = gptq(weight, *solve_order(hessian), scale, zero, qtype)
    order = torch.randperm(130)
    again = gptq(weight[:, order].flip(0), *solve_order(hessian[order][:, order]), scale, zero, qtype)
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
    assert torch.equal(
        gptq(weight, *solve_order(zeros), scale, zero, QType(4)).int(), quantize(weight, scale, zero, QType(4))
    )
