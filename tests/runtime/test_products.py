"""Products of codes against a float64 convolution of what the codes stand for."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from ptq_tdq.errors import RuntimeUnsupportedError
from ptq_tdq.runtime.cpu import check_exact
from ptq_tdq.runtime.products import Geometry, NativeProducts, OneDnnProducts, Products, Weights
from ptq_tdq.runtime.step import Interval

Make = Callable[[Weights, Geometry], Products]


@pytest.fixture(params=["native", "onednn"])
def make(request: pytest.FixtureRequest) -> Make:
    if request.param == "onednn":
        return OneDnnProducts
    library: ctypes.CDLL = request.getfixturevalue("library")
    if not hasattr(library, "convolve"):
        pytest.skip("no AVX512-VNNI here")
    return lambda weights, geometry: NativeProducts(weights, geometry, library)


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


def test_grouped_convolutions() -> None:
    geometry = Geometry((3, 3), groups=4)
    weights = random_weights(4, 8, 2, (3, 3), seed=3)
    codes = torch.randint(0, 256, (2, 8, 5, 5), dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    interval = Interval(torch.tensor([0.1]), torch.tensor([7], dtype=torch.int32))
    assert not NativeProducts.covers(weights, geometry)
    found = OneDnnProducts(weights, geometry)(codes, interval, None)
    torch.testing.assert_close(found.double(), in_float64(codes, interval, weights, geometry), rtol=1e-5, atol=1e-5)


def test_4_bit_weights_stay_two_to_a_byte(library: ctypes.CDLL) -> None:
    if not hasattr(library, "convolve"):
        pytest.skip("no AVX512-VNNI here")
    narrow = NativeProducts(random_weights(4, 64, 64, (3, 3), 0), Geometry((3, 3)), library)
    wide = NativeProducts(random_weights(5, 64, 64, (3, 3), 0), Geometry((3, 3)), library)
    beside = 64 * (4 + 4 + 4 + 1)  # scale, bias, sum and zero point of each output
    assert (narrow.nbytes, wide.nbytes) == (64 * 64 * 9 // 2 + beside, 64 * 64 * 9 + beside)


@pytest.mark.parametrize(("weight", "code", "exact"), [(128, 255, False), (127, 127, True), (15, 255, True)])
def test_without_vnni_sums_that_saturate_are_refused(weight: int, code: int, exact: bool) -> None:
    # vpmaddubsw adds two products in 16 bits: 2 * 127 * 127 = 32258 fits, 2 * 128 * 255 does not
    if exact:
        check_exact("conv_in", weight, code, "none")
    else:
        with pytest.raises(RuntimeUnsupportedError, match="no VNNI: the integer sums of conv_in"):
            check_exact("conv_in", weight, code, "none")
    check_exact("conv_in", weight, code, "vnni")
