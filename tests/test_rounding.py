"""Learned rounding on problems small enough to try every rounding."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from ptq_tdq.affine import dequantize, quantize
from ptq_tdq.rounding import AdaRound, LearnedCodes, annealed_b
from ptq_tdq.scheme import QType


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 3), (6, 4, 3, 3)])
def test_the_soft_weight_starts_as_the_weight(bits: int, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    qtype, weight = QType(bits), torch.randn(shape)
    ones = (6,) + (1,) * (len(shape) - 1)
    scale = (weight.abs().flatten(1).amax(1) / (qtype.qmax / 4)).view(ones)
    zero = torch.full(ones, qtype.qmax // 2)
    rounding = AdaRound(weight, scale, zero, qtype)
    lo, hi = (qtype.qmin - zero) * scale, (qtype.qmax - zero) * scale
    torch.testing.assert_close(rounding.soft_weight(), weight.clamp(lo, hi), rtol=1e-5, atol=1e-5)


def test_the_hard_codes_start_as_rounding_to_nearest() -> None:
    torch.manual_seed(1)
    qtype, weight, scale, zero = QType(4), torch.randn(200), torch.tensor(0.2), torch.tensor(7)
    codes = AdaRound(weight, scale, zero, qtype).hard_codes()
    assert torch.equal(codes, quantize(weight, scale, zero, qtype))
    assert codes.dtype == torch.int32 and 0 in codes and 15 in codes, "the range's ends are reached"


def test_learned_rounding_is_better_than_nearest_and_close_to_the_best_of_all() -> None:
    """Correlated inputs: rounding to nearest ignores that errors can cancel (arXiv 2004.10568, section 3)."""
    torch.manual_seed(2)
    qtype, scale, zero = QType(3), torch.tensor(0.5), torch.tensor(4)
    ratios = []
    for _ in range(5):
        weight = torch.randn(1, 10) * 0.7
        x = torch.randn(64, 10) @ (torch.eye(10) + 0.5 * torch.rand(10, 10))
        target = x @ weight.T

        def loss(codes: np.ndarray, x=x, target=target) -> float:
            return float(np.square((codes - 4) * 0.5 @ x.double().numpy().T - target.double().numpy().T).mean())

        floor = np.floor(weight.double().numpy() / 0.5) + 4
        choices = (np.clip(floor + np.array(up), 0, 7) for up in itertools.product((0, 1), repeat=10))
        best = min(loss(codes) for codes in choices)
        nearest = loss(quantize(weight, scale, zero, qtype).double().numpy())

        rounding = AdaRound(weight, scale, zero, qtype)
        optimizer = torch.optim.Adam([rounding.alpha], lr=2e-2)
        iterations = 500
        for i in range(iterations):
            error = (x @ rounding.soft_weight().T - target).square().mean()
            b = annealed_b(i / iterations, warmup=0.2, start=20.0, end=2.0)
            if b is not None:
                error = error + 0.03 * rounding.regularizer(b)
            optimizer.zero_grad()
            error.backward()
            optimizer.step()
        learned = loss(rounding.hard_codes().double().numpy())
        assert best <= learned * (1 + 1e-9) and learned <= nearest
        ratios.append((learned / best, nearest / best))
    learned_ratio, nearest_ratio = np.median(ratios, axis=0)
    assert learned_ratio < 1.2 < nearest_ratio, ratios


@pytest.mark.parametrize("b", [20.0, 5.0, 2.0])
def test_the_regularizer_is_zero_for_decided_weights_and_counts_undecided_ones(b: float) -> None:
    decided = AdaRound(torch.tensor([0.0, 1.0]), torch.tensor(1.0), torch.tensor(0), QType(4))
    with torch.no_grad():
        decided.alpha.copy_(torch.tensor([-30.0, 30.0]))
    assert decided.h().tolist() == [0.0, 1.0] and decided.regularizer(b).item() == 0.0
    open_ = AdaRound(torch.full((5,), 2.5), torch.tensor(1.0), torch.tensor(0), QType(4))
    assert open_.regularizer(b).item() == pytest.approx(5.0)
    third = AdaRound(torch.full((1,), 0.25), torch.tensor(1.0), torch.tensor(0), QType(4))
    assert third.regularizer(b).item() == pytest.approx(1 - 0.5**b, rel=1e-5)


def test_the_gradient_of_the_soft_weight_is_that_of_the_rectified_sigmoid() -> None:
    torch.manual_seed(3)
    weight = torch.rand(20, dtype=torch.float64) * 4 - 2  # all inside the range, [-2.4, 2.1]
    rounding = AdaRound(weight, torch.tensor(0.3, dtype=torch.float64), torch.tensor(8), QType(4))
    rounding.soft_weight().sum().backward()
    sigma = 1 / (1 + np.exp(-rounding.alpha.detach().numpy()))
    assert rounding.alpha.grad is not None
    np.testing.assert_allclose(rounding.alpha.grad.numpy(), 0.3 * 1.2 * sigma * (1 - sigma), rtol=1e-6)


def test_b_is_unused_in_warm_up_then_falls_on_a_line() -> None:
    def b(progress: float) -> float | None:
        return annealed_b(progress, warmup=0.2, start=20.0, end=2.0)

    assert b(0.0) is None and b(0.199) is None
    assert b(0.2) == pytest.approx(20.0) and b(0.6) == pytest.approx(11.0) and b(1.0) == pytest.approx(2.0)
    values = [b(p) for p in np.linspace(0.2, 1, 9)]
    assert np.diff(np.array(values, float)).tolist() == pytest.approx([-18 / 8] * 8)
    assert annealed_b(0.0, warmup=0.0, start=20.0, end=2.0) == 20.0
    assert all(math.isfinite(v) for v in values if v is not None)


def test_learned_codes_start_as_given_and_are_codes_at_any_time() -> None:
    torch.manual_seed(4)
    qtype, weight, scale, zero = QType(3), torch.randn(6, 50), torch.rand(6, 1) + 0.1, torch.randint(2, 6, (6, 1))
    codes = (quantize(weight, scale, zero, qtype) + torch.randint(-1, 2, (6, 50))).clamp(0, 7)
    learned = LearnedCodes(weight, codes, scale, zero, qtype)
    assert torch.equal(learned.hard_codes(), codes.int())
    with torch.no_grad():
        learned.position += 3 * torch.randn(6, 50)
        learned.log_scale += torch.randn(6, 1)
    now = dequantize(learned.hard_codes(), learned.scale(), zero)
    assert torch.equal(learned.soft_weight(), now) and not torch.equal(learned.hard_codes(), codes.int())
    assert learned.hard_codes().min() == 0 and learned.hard_codes().max() == 7


def test_the_gradient_of_learned_codes_passes_the_rounding() -> None:
    """As if the position were the code: s for each position, the weight itself for the logarithm of a row's scale."""
    torch.manual_seed(5)
    weight, scale, zero = torch.randn(3, 20), torch.rand(3, 1) + 0.1, torch.tensor(4)
    learned = LearnedCodes(weight, quantize(weight, scale, zero, QType(4)), scale, zero, QType(4))
    upstream = torch.randn(3, 20)
    (learned.soft_weight() * upstream).sum().backward()
    torch.testing.assert_close(learned.position.grad, upstream * scale)
    torch.testing.assert_close(learned.log_scale.grad, (upstream * learned.soft_weight().detach()).sum(1, keepdim=True))
