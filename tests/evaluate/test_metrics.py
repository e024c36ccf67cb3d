"""Decibels in closed form."""

from __future__ import annotations

import math

import pytest
import torch

from ptq_tdq.affine import choose_qparams, fake_quantize
from ptq_tdq.evaluate.metrics import psnr_db, sqnr_db
from ptq_tdq.scheme import QType


@pytest.mark.parametrize(("error", "expected"), [(1.0, 0.0), (0.1, 20.0), (0.01, 40.0), (10.0, -20.0)])
def test_sqnr_of_a_relative_error(error: float, expected: float) -> None:
    x = torch.randn(1000, dtype=torch.float64)
    assert sqnr_db(x, x * (1 + error)) == pytest.approx(expected)
    assert sqnr_db(7 * x, 7 * x * (1 - error)) == pytest.approx(expected), "the scale of the signal does not matter"


@pytest.mark.parametrize("bits", [3, 4, 6, 8])
def test_sqnr_of_uniform_noise_gains_6_db_per_bit(bits: int) -> None:
    """A uniform signal of full range: signal range^2 / 12, noise s^2 / 12, so 20 log10 of the number of steps."""
    x = torch.rand(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 0.5
    scale, zero = choose_qparams(torch.tensor(-0.5), torch.tensor(0.5), QType(bits))
    steps = 2**bits - 1
    assert sqnr_db(x, fake_quantize(x, scale, zero, QType(bits))) == pytest.approx(20 * math.log10(steps), abs=0.15)


@pytest.mark.parametrize("peak", [1.0, 2.0, 255.0])
def test_psnr_of_a_constant_error(peak: float) -> None:
    x = torch.rand(3, 8, 8) * peak
    assert psnr_db(x, x + 0.01 * peak, peak) == pytest.approx(40.0, abs=1e-3)


def test_psnr_depends_on_the_peak_and_not_on_the_signal() -> None:
    x, noise = torch.zeros(100), torch.full((100,), 0.5)
    assert psnr_db(x, noise, 1.0) == pytest.approx(10 * math.log10(4))
    assert psnr_db(x + 3, noise + 3, 1.0) == pytest.approx(10 * math.log10(4))
    assert psnr_db(x, noise, 2.0) == pytest.approx(10 * math.log10(16))


def test_equal_tensors_and_a_silent_signal() -> None:
    x = torch.randn(5)
    assert sqnr_db(x, x) == psnr_db(x, x, 1.0) == math.inf
    assert sqnr_db(torch.zeros(5), torch.zeros(5)) == math.inf
    assert sqnr_db(torch.zeros(5), x) == -math.inf


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_do_not_overflow_or_lose_digits_in_low_precision(dtype: torch.dtype) -> None:
    x = torch.full((10_000,), 256.0, dtype=dtype)
    assert sqnr_db(x, x + 2) == pytest.approx(20 * math.log10(128))
