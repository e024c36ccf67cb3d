"""The nodes against the formulas written out, and their gradients against finite differences."""

from __future__ import annotations

import pytest
import torch

from ptq_tdq.fused import power_sum, rectified_sigmoid


@pytest.mark.parametrize("power", [2.0, 2.4, 20.0])
def test_power_sum(power: float) -> None:
    torch.manual_seed(0)
    x = (torch.rand(3, 5, dtype=torch.float64) * 2 - 1).requires_grad_()
    torch.testing.assert_close(power_sum(x, power), x.abs().pow(power).sum())
    assert torch.autograd.gradcheck(lambda v: power_sum(v, power), (x,))
    zero = torch.zeros(2, requires_grad=True)
    power_sum(zero, power).backward()
    assert zero.grad is not None and zero.grad.tolist() == [0.0, 0.0]


def test_power_sum_of_many_half_precision_numbers_does_not_overflow() -> None:
    x = torch.full((100_000,), 2.0, dtype=torch.float16)
    assert power_sum(x, 2.0).item() == pytest.approx(4e5)


def test_rectified_sigmoid() -> None:
    alpha = torch.linspace(-6, 6, 50, dtype=torch.float64, requires_grad=True)
    expected = (torch.sigmoid(alpha) * 1.2 - 0.1).clamp(0, 1)
    found = rectified_sigmoid(alpha, 1.1, -0.1)
    torch.testing.assert_close(found, expected)
    assert found.min() == 0 and found.max() == 1
    gradients = [torch.autograd.grad(y.sum(), alpha)[0] for y in (found, expected)]
    torch.testing.assert_close(*gradients)
