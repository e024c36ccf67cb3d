"""Products of codes against a float64 convolution of what the codes stand for."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import partial

import pytest
import torch
from kinds import MARCH, library_of
from torch import Tensor
from torch.nn import functional

from ptq_tdq.processor import sums_eight_bits
from ptq_tdq.runtime.products import FloatProducts, Geometry, NativeProducts, OneDnnProducts, Products, Weights
from ptq_tdq.runtime.step import Interval

Make = Callable[[Weights, Geometry], Products]
EXACT = {"float": FloatProducts} | ({"oneDNN": OneDnnProducts} if sums_eight_bits() else {})  # for any geometry


@pytest.fixture(params=[*MARCH, *EXACT])
def make(request: pytest.FixtureRequest) -> Make:
    kind: str = request.param
    if kind in EXACT:
        return EXACT[kind]
    return partial(NativeProducts, library=library_of(kind))


def random_weights(bits: int, outputs: int, channels: int, kernel: tuple[int, int], seed: int) -> Weights:
    """Codes over their whole range, with extreme zero points among the others."""
    generator = torch.Generator().manual_seed(seed)
    top = 2**bits - 1
    zero_point = torch.randint(0, top + 1, (outputs,), generator=generator, dtype=torch.int32)
    zero_point[:2] = torch.tensor([0, top])[:outputs]
    return Weights(
        torch.randint(0, top + 1, (outputs, channels, *kernel), generator=generator, dtype=torch.uint8),
        bits,
        torch.rand(outputs, generator=generator) * 0.1 + 0.01,
        zero_point,
        torch.randn(outputs, generator=generator),
    )


def in_float64(codes: Tensor, interval: Interval, weights: Weights, geometry: Geometry) -> Tensor:
    scale, zero_point = interval.scale.double().view(-1, 1, 1, 1), interval.zero_point.view(-1, 1, 1, 1)
    x = (codes.double() - zero_point) * scale
    w = (weights.codes.double() - weights.zero_point.view(-1, 1, 1, 1)) * weights.scale.double().view(-1, 1, 1, 1)
    return functional.conv2d(x, w, weights.bias.double(), geometry.stride, 0, geometry.dilation, geometry.groups)


GEOMETRIES = [
    Geometry(),
    Geometry((3, 3)),
    Geometry((3, 3), stride=(2, 2)),
    Geometry((3, 1), stride=(1, 2)),
    Geometry((3, 3), dilation=(2, 1)),
]


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("mixed", [False, True], ids=["one t", "mixed t"])
def test_equals_a_float64_evaluation_of_the_same_codes(make: Make, bits: int, geometry: Geometry, mixed: bool) -> None:
    weights = random_weights(bits, 35, 12, geometry.kernel, seed=bits)
    generator = torch.Generator().manual_seed(7)
    codes = torch.randint(0, 256, (3, 12, 9, 7), generator=generator, dtype=torch.uint8)
    codes = codes.contiguous(memory_format=torch.channels_last)
    scale, zero_point = torch.tensor([0.031, 0.4, 0.0023]), torch.tensor([3, 128, 255], dtype=torch.int32)
    interval = Interval(scale, zero_point) if mixed else Interval(scale[:1], zero_point[:1])
    expected = in_float64(codes, interval, weights, geometry)
    found = make(weights, geometry)(codes, interval, None)
    assert found.dtype == torch.float32 and found.shape == expected.shape
    scale_of_output = expected.abs().amax((1, 2, 3), keepdim=True)
    assert float(((found - expected).abs() / scale_of_output).max()) < 1e-6


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("mixed", [False, True], ids=["one t", "mixed t"])
def test_adds_its_result_to_what_is_there(make: Make, bits: int, mixed: bool) -> None:
    weights, geometry = random_weights(bits, 8, 4, (3, 3), seed=1), Geometry((3, 3))
    codes = torch.randint(0, 256, (2, 4, 6, 6), dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    scale, zero_point = torch.tensor([0.1, 0.2]), torch.tensor([5, 9], dtype=torch.int32)
    interval = Interval(scale, zero_point) if mixed else Interval(scale[:1], zero_point[:1])
    residual = torch.randn(2, 8, 4, 4)
    expected = in_float64(codes, interval, weights, geometry) + residual
    found = make(weights, geometry)(codes, interval, residual.clone(memory_format=torch.channels_last))
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("channels", [20, 64])
@pytest.mark.parametrize("weight", [-15, 15, -128, 127])
def test_the_largest_sums_are_exact(make: Make, weight: int, channels: int) -> None:
    # where instructions add products in 16 bits, two of 255 x 127 do not fit, and many of 255 x 15 do not
    zero_point = torch.full((16,), max(-weight, 0), dtype=torch.int32)
    codes = torch.full((16, channels, 3, 3), max(weight, 0), dtype=torch.uint8)
    weights = Weights(codes, 4 if abs(weight) == 15 else 8, torch.ones(16), zero_point, torch.zeros(16))
    x = torch.full((1, channels, 5, 4), 255, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    interval = Interval(torch.ones(1), torch.zeros(1, dtype=torch.int32))
    found = make(weights, Geometry((3, 3)))(x, interval, None)
    assert torch.equal(found, torch.full((1, 16, 3, 2), 255.0 * weight * channels * 9))


@pytest.mark.parametrize("bits", [4, 8])
def test_grouped_convolutions(bits: int) -> None:
    geometry = Geometry((3, 3), groups=4)
    weights = random_weights(bits, 8, 2, (3, 3), seed=3)
    codes = torch.randint(0, 256, (2, 8, 5, 5), dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    interval = Interval(torch.tensor([0.1]), torch.tensor([7], dtype=torch.int32))
    assert not NativeProducts.covers(weights, geometry)
    expected = in_float64(codes, interval, weights, geometry)
    for products in EXACT.values():
        found = products(weights, geometry)(codes, interval, None)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_sums_beyond_the_integers_of_float32_are_rounded_once() -> None:
    generator = torch.Generator().manual_seed(0)
    codes, values = (
        torch.randint(0, 256, (rows, 4096, 1, 1), generator=generator, dtype=torch.uint8) for rows in (8, 16)
    )
    weights = Weights(values, 8, torch.ones(16), torch.zeros(16, dtype=torch.int32), torch.zeros(16))
    interval = Interval(torch.ones(1), torch.zeros(1, dtype=torch.int32))
    exact = codes.flatten(1).long() @ values.flatten(1).long().T
    assert exact.min() > 2**24
    assert torch.equal(FloatProducts(weights, Geometry())(codes, interval, None).flatten(1), exact.float())


def test_single_pixels_may_be_of_a_convolution_with_a_stride(make: Make) -> None:
    weights, geometry = random_weights(8, 8, 4, (1, 1), seed=2), Geometry(stride=(2, 2))
    codes = torch.randint(0, 256, (5, 4, 1, 1), dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    interval = Interval(torch.tensor([0.1]), torch.tensor([7], dtype=torch.int32))
    expected = in_float64(codes, interval, weights, geometry)
    torch.testing.assert_close(make(weights, geometry)(codes, interval, None).double(), expected, rtol=1e-5, atol=1e-5)


def test_4_bit_weights_stay_two_to_a_byte(library: ctypes.CDLL) -> None:
    narrow = NativeProducts(random_weights(4, 64, 64, (3, 3), 0), Geometry((3, 3)), library)
    wide = NativeProducts(random_weights(5, 64, 64, (3, 3), 0), Geometry((3, 3)), library)
    beside = 64 * (4 + 4 + 4 + 1)  # scale, bias, sum and zero point of each output
    assert (narrow.nbytes, wide.nbytes) == (64 * 64 * 9 // 2 + beside, 64 * 64 * 9 + beside)
