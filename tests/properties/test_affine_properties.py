"""What must hold of the affine form for all values: bounds, order, exact zero, idempotence."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ptq_tdq.affine import choose_qparams, dequantize, fake_quantize, quantize
from ptq_tdq.scheme import QType

EPSILON = torch.finfo(torch.float32).eps

qtypes = st.builds(QType, st.integers(2, 8), signed=st.booleans())
reals = st.floats(-1e6, 1e6, width=32)
vectors = st.lists(reals, min_size=1, max_size=40).map(torch.tensor)
ranges = st.tuples(reals, reals).filter(lambda pair: abs(pair[0] - pair[1]) > 1e-6)


def qparams(ends: tuple[float, float], qtype: QType) -> tuple[Tensor, Tensor]:
    return choose_qparams(torch.tensor(min(ends)), torch.tensor(max(ends)), qtype)


@given(ranges, qtypes)
def test_zero_is_exact(ends: tuple[float, float], qtype: QType) -> None:
    scale, zero = qparams(ends, qtype)
    assert qtype.qmin <= zero <= qtype.qmax
    assert fake_quantize(torch.zeros(1), scale, zero, qtype).item() == 0.0
    assert quantize(torch.zeros(1), scale, zero, qtype).item() == zero


@given(ranges, qtypes, st.lists(st.floats(0, 1), min_size=1, max_size=40))
def test_a_value_in_the_range_moves_by_half_a_step_at_most(
    ends: tuple[float, float], qtype: QType, fractions: list[float]
) -> None:
    """Also at the ends, although the zero point's own rounding shifts the grid."""
    scale, zero = qparams(ends, qtype)
    lo, hi = min(*ends, 0.0), max(*ends, 0.0)
    x = (torch.tensor(fractions, dtype=torch.float64) * (hi - lo) + lo).float().clamp(lo, hi)
    error = (fake_quantize(x, scale, zero, qtype).double() - x.double()).abs()
    slack = 4 * EPSILON * max(abs(lo), abs(hi))
    assert bool((error <= scale.double() / 2 + slack).all())


@given(ranges, qtypes, vectors)
def test_codes_stay_in_range_and_decode_to_the_fake_quantized_values(
    ends: tuple[float, float], qtype: QType, x: Tensor
) -> None:
    scale, zero = qparams(ends, qtype)
    codes = quantize(x, scale, zero, qtype)
    assert codes.dtype == torch.int32
    assert bool(((codes >= qtype.qmin) & (codes <= qtype.qmax)).all())
    assert torch.equal(dequantize(codes, scale, zero), fake_quantize(x, scale, zero, qtype))


@given(ranges, qtypes, vectors)
def test_quantizing_twice_changes_nothing(ends: tuple[float, float], qtype: QType, x: Tensor) -> None:
    scale, zero = qparams(ends, qtype)
    once = fake_quantize(x, scale, zero, qtype)
    assert torch.equal(fake_quantize(once, scale, zero, qtype), once)


@given(ranges, qtypes, vectors)
def test_order_is_kept(ends: tuple[float, float], qtype: QType, x: Tensor) -> None:
    scale, zero = qparams(ends, qtype)
    out = fake_quantize(x.sort().values, scale, zero, qtype)
    assert bool((out.diff() >= 0).all())


@given(qtypes, st.integers(0, 2**32 - 1))
@settings(max_examples=50)
def test_every_code_survives_the_round_trip(qtype: QType, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand((), generator=generator) * 10 + 1e-4
    zero = torch.randint(qtype.qmin, qtype.qmax + 1, (), generator=generator)
    codes = torch.arange(qtype.qmin, qtype.qmax + 1, dtype=torch.int32)
    assert torch.equal(quantize(dequantize(codes, scale, zero), scale, zero, qtype), codes)
