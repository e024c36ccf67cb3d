"""The native passes against torch operations, and those against the simulated quantizer."""

from __future__ import annotations

import ctypes

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from ptq_tdq.affine import quantize
from ptq_tdq.rotate import rotated
from ptq_tdq.runtime.attention import native_attend, reference_attend
from ptq_tdq.runtime.kernels import ACTIVATIONS, Activation, Before, Grid, Norm, Rotate, reference_quantize
from ptq_tdq.runtime.native import native_quantize, native_weight_only
from ptq_tdq.runtime.step import Interval
from ptq_tdq.scheme import QType


def test_reference_codes_are_those_of_the_onnx_form_between_zero_points() -> None:
    x = torch.randn(2, 6, 4, 5)
    scale, zero_point = torch.tensor([0.1, 0.02]), torch.tensor([7, 100], dtype=torch.int32)
    codes = reference_quantize(x, Grid((1, 5), 4, 8, (1, 0, 2, 3), up=2), scale, zero_point)
    enlarged = functional.interpolate(x[:, 1:5], scale_factor=2, mode="nearest")
    padded = functional.pad(enlarged, (0, 3, 1, 2))  # 0 is exactly representable: its code is the zero point
    each = (2, 1, 1, 1)
    assert torch.equal(codes.int(), quantize(padded, scale.view(each), zero_point.view(each), QType(8)))


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 70), st.integers(1, 6), st.integers(1, 6)),
    padding=st.tuples(*[st.integers(0, 2)] * 4),
    up=st.integers(1, 2),
    bits=st.integers(2, 8),
    mixed=st.booleans(),
    data=st.data(),
)
def test_native_codes_are_the_reference_codes(
    library: ctypes.CDLL,
    shape: tuple[int, int, int, int],
    padding: tuple[int, int, int, int],
    up: int,
    bits: int,
    mixed: bool,
    data: st.DataObject,
) -> None:
    lo = data.draw(st.integers(0, shape[1] - 1))
    hi = data.draw(st.integers(lo + 1, shape[1]))
    grid = Grid((lo, hi), hi - lo + data.draw(st.integers(0, 3)), bits, padding, up)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 9)))
    # multiples of half a scale: ties are frequent, and must go to even as in ONNX
    x = torch.randint(-300, 300, shape, generator=generator).float() * 0.0625
    rows = shape[0] if mixed else 1
    scale = torch.full((rows,), 0.125)
    zero_point = torch.randint(0, 2**bits, (rows,), generator=generator, dtype=torch.int32)
    expected = reference_quantize(x, grid, scale, zero_point)
    assert torch.equal(native_quantize(library)(x, grid, scale, zero_point), expected)


ACTIVATED = [None, *(Activation(name, gated) for name in ACTIVATIONS for gated in (False, True))]


@pytest.mark.parametrize("activation", [a for a in ACTIVATED if a is None or not a.gated])
@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize(("channels", "groups"), [(64, 32), (96, 32), (20, 5)])
def test_native_norm_gives_the_reference_codes_but_for_ties(
    library: ctypes.CDLL, activation: Activation | None, moved: bool, channels: int, groups: int
) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, channels, 16, 16) * 3 + 20  # a mean far from 0 is what one-pass variances fear
    norm = Norm(groups, torch.randn(channels), torch.randn(channels), 1e-5)
    shift = torch.randn(3, channels) * 4 if moved else None
    assert_codes_but_for_ties(library, x, channels, Before(shift, norm, activation))


@pytest.mark.parametrize("activation", ACTIVATED)
@pytest.mark.parametrize("rotate", [None, rotated])
@pytest.mark.parametrize("channels", [1, 7, 96, 192])
def test_native_activation_and_rotation_give_the_reference_codes_but_for_ties(
    library: ctypes.CDLL, activation: Activation | None, rotate: Rotate | None, channels: int
) -> None:
    torch.manual_seed(0)
    gated = activation is not None and activation.gated
    x = torch.randn(3, channels * (1 + gated), 16, 16) * 3
    assert_codes_but_for_ties(library, x, channels, Before(None, None, activation, rotate, torch.rand(channels) + 0.5))


def assert_codes_but_for_ties(library: ctypes.CDLL, x: torch.Tensor, channels: int, before: Before) -> None:
    """Only values that lie on a rounding tie within float error may have another code."""
    scale, zero_point = torch.tensor([0.02]), torch.tensor([100], dtype=torch.int32)
    arguments = (x, Grid((0, channels), channels + 2, 8, (1, 1, 1, 1)), scale, zero_point, before)
    difference = (native_quantize(library)(*arguments).int() - reference_quantize(*arguments).int()).abs()
    assert difference.max() <= 1
    assert difference.float().mean() < 1e-3


@pytest.mark.parametrize("channels", [1, 37, 192])
@pytest.mark.parametrize("rows", [1, 7, 8, 9])
@pytest.mark.parametrize("biased", [False, True])
def test_native_products_of_few_rows_equal_those_in_float64(
    library: ctypes.CDLL, channels: int, rows: int, biased: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-128, 128, (33, channels), generator=generator, dtype=torch.int8)
    x, scale, bias = (torch.randn(shape, generator=generator) for shape in ((rows, channels), (33,), (33,)))
    expected = x.double() @ codes.double().T * scale + (bias if biased else 0)
    found = native_weight_only(library)(x, codes, scale, bias if biased else None)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("mixed", [False, True], ids=["one t", "mixed t"])
@pytest.mark.parametrize(
    ("queries", "keys", "heads", "key_heads", "depth", "value_depth"),
    [(64, 64, 2, 2, 64, 64), (16, 16, 1, 1, 8, 8), (37, 21, 3, 3, 20, 20), (5, 70, 6, 2, 12, 33), (1, 1, 2, 1, 4, 4)],
)
@pytest.mark.parametrize("mask", ["none", "for each sample", "for each row", "for all", "nothing to see"])
def test_native_attention_equals_the_reference(
    library: ctypes.CDLL,
    mixed: bool,
    queries: int,
    keys: int,
    heads: int,
    key_heads: int,
    depth: int,
    value_depth: int,
    mask: str,
) -> None:
    torch.manual_seed(1)
    q = torch.randn(2, queries, heads, depth).transpose(1, 2)
    k, v = (torch.randn(2, key_heads, keys, size) for size in (depth, value_depth))
    rows = 2 if mixed else 1
    scale = torch.tensor([[0.03], [0.025], [0.02], [1 / 255]]) * torch.linspace(1, 1.5, rows)
    zero_point = torch.tensor([[128], [120], [131], [0]], dtype=torch.int32).expand(4, rows).contiguous()
    shapes = {"for each sample": (2, 1, 1, keys), "for each row": (heads, queries, keys), "for all": (1, keys)}
    added = torch.randn(shapes[mask]) * 3 if mask in shapes else None
    if added is not None and keys > 1:
        added[..., ::3] = -torch.inf
    elif mask == "nothing to see":
        added = torch.zeros(2, 1, queries, keys)
        added[1, :, 0] = -torch.inf

    def find(index: int, x: torch.Tensor) -> Interval:
        return Interval(scale[index], zero_point[index])

    arguments = (q, k, v, find, [8, 8, 8, 8], depth**-0.5, added)
    expected, found = reference_attend(*arguments), native_attend(library)(*arguments)
    assert found.shape == expected.shape == (2, heads, queries, value_depth)
    if mask == "nothing to see":
        assert not found[1, :, 0].any()
    # a softmax value on a tie may take the other code: one level of one token's value at most
    assert (found - expected).abs().max() < 1.5 * float(scale[3].max() * scale[2].max()) * 130
    assert (found - expected).abs().mean() < 1e-4 * expected.abs().mean()
