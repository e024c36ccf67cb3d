"""The affine form against torch's own learnable fake quantization, finite differences and the formula itself."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from ptq_tdq.affine import choose_qparams, dequantize, end_scales, fake_quantize, quantize
from ptq_tdq.scheme import QType


def off_ties(x: Tensor, scale: Tensor, margin: float = 0.05) -> Tensor:
    """``x`` moved away from the ties of rounding, where one float division decides."""
    u = x / scale
    near = ((u - u.floor()) - 0.5).abs() < margin
    return torch.where(near, x + 2 * margin * scale, x).detach()


QTYPES = [QType(8), QType(4), QType(2), QType(8, signed=True), QType(4, signed=True)]


@pytest.mark.parametrize("qtype", QTYPES, ids=str)
def test_the_scales_of_the_ends_have_the_outermost_codes_there(qtype: QType) -> None:
    lo, hi = torch.tensor([-3.0, -0.5]), torch.tensor([1.0, 2.0])
    for code in (qtype.qmin, qtype.qmin + 1, qtype.qmax):
        zero_point = torch.tensor(code, dtype=torch.int32)
        for end, outermost, scale in zip(
            (lo, hi), (qtype.qmin, qtype.qmax), end_scales(lo, hi, zero_point, qtype), strict=True
        ):
            expected = torch.zeros(2) if code == outermost else end
            torch.testing.assert_close((outermost - zero_point) * scale, expected)


@pytest.mark.parametrize("qtype", QTYPES, ids=str)
@pytest.mark.parametrize("zero_part", [0.0, 0.3, 1.0])
def test_values_and_gradients_are_those_of_torch_per_tensor(qtype: QType, zero_part: float) -> None:
    torch.manual_seed(0)
    # Not below 0: there torch's per-tensor backward truncates zero_point + 0.5 and is off by one (2.13); the
    # per-channel test has negative ones.
    zero_point = torch.tensor([round(zero_part * qtype.qmax)], dtype=torch.int32)
    scale = torch.tensor([0.37], requires_grad=True)
    reach = 0.8 * 0.37 * (qtype.qmax - qtype.qmin)
    x = off_ties(torch.randn(4, 3, 5) * reach, scale).requires_grad_()
    g = torch.randn_like(x)

    ours = fake_quantize(x, scale, zero_point, qtype)
    gradients = torch.autograd.grad(ours, (x, scale), g)
    theirs = torch._fake_quantize_learnable_per_tensor_affine(x, scale, zero_point.float(), qtype.qmin, qtype.qmax, 1.0)
    expected = torch.autograd.grad(theirs, (x, scale), g)

    torch.testing.assert_close(ours, theirs)
    assert bool((gradients[0] == 0).any()) and bool((gradients[0] != 0).any()), "both sides of the range are tried"
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("qtype", QTYPES, ids=str)
def test_values_and_gradients_are_those_of_torch_per_channel(qtype: QType) -> None:
    torch.manual_seed(1)
    channels = 6
    zero_point = torch.randint(qtype.qmin, qtype.qmax + 1, (channels,), dtype=torch.int32)
    scale = (torch.rand(channels) + 0.1).requires_grad_()
    shape = (channels, 1, 1)
    x = off_ties(torch.randn(channels, 7, 3) * qtype.qmax * 0.4, scale.view(shape)).requires_grad_()
    g = torch.randn_like(x)

    ours = fake_quantize(x, scale.view(shape), zero_point.view(shape), qtype)
    gradients = torch.autograd.grad(ours, (x, scale), g)
    theirs = torch._fake_quantize_learnable_per_channel_affine(
        x, scale, zero_point.float(), 0, qtype.qmin, qtype.qmax, 1.0
    )
    expected = torch.autograd.grad(theirs, (x, scale), g)

    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-4)


def test_scale_gradient_is_the_finite_difference_of_the_straight_through_form() -> None:
    """LSQ: with the rounding residual r = round(u) - u held fixed, x_hat = s clamp(x/s + r) is differentiable in s."""
    torch.manual_seed(2)
    qtype, zero_point = QType(4), torch.tensor(5)
    scale = torch.tensor(0.21, dtype=torch.float64, requires_grad=True)
    x = torch.randn(200, dtype=torch.float64) * 1.2
    g = torch.randn_like(x)
    (gradient,) = torch.autograd.grad(fake_quantize(x, scale, zero_point, qtype), scale, g)

    residual = torch.round(x / scale.detach()) - x / scale.detach()

    # held fixed: which values are clipped, and the straight-through x (d round(u)/du := 1 for x, so u is x / s0)
    def surrogate(s: float) -> float:
        low, high = qtype.qmin - 5, qtype.qmax - 5
        inside = (torch.round(x / scale.detach()) >= low) & (torch.round(x / scale.detach()) <= high)
        level = torch.where(inside, x / s + residual, torch.round(x / scale.detach()).clamp(low, high))
        return float((s * level * g).sum())

    step = 1e-6
    finite = (surrogate(0.21 + step) - surrogate(0.21 - step)) / (2 * step)
    assert gradient.item() == pytest.approx(finite, rel=1e-6)


def test_scale_gradient_outside_the_range_is_the_true_derivative() -> None:
    """A clipped value is s (q - z) with a constant q: there finite differences of the real function hold."""
    qtype, zero_point = QType(4, signed=True), torch.tensor(-2)
    x = torch.tensor([100.0, -100.0], dtype=torch.float64)
    scale = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    jacobian = torch.stack(
        [torch.autograd.grad(fake_quantize(x, scale, zero_point, qtype)[i], scale)[0] for i in (0, 1)]
    )
    step = 1e-6
    up, down = (fake_quantize(x, scale.detach() + d, zero_point, qtype) for d in (step, -step))
    torch.testing.assert_close(jacobian, (up - down) / (2 * step), rtol=1e-6, atol=0)


def test_each_sample_has_its_own_scale_and_scale_gradient() -> None:
    torch.manual_seed(3)
    qtype = QType(4)
    x = torch.randn(3, 2, 4, 4)
    scale = torch.tensor([0.05, 0.2, 0.8]).view(3, 1, 1, 1).requires_grad_()
    zero = torch.tensor([3, 8, 12]).view(3, 1, 1, 1)
    together = fake_quantize(x, scale, zero, qtype)
    (gradient,) = torch.autograd.grad(together.square().sum(), scale)
    for i in range(3):
        own = scale[i].detach().clone().requires_grad_()
        alone = fake_quantize(x[i], own, zero[i], qtype)
        assert torch.equal(together[i], alone)
        torch.testing.assert_close(gradient[i], torch.autograd.grad(alone.square().sum(), own)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(), (4, 1), (1, 8)])
def test_low_precision_input_keeps_its_dtype_and_is_quantized_in_float32(
    dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(4)
    qtype = QType(8)
    x = (torch.randn(4, 8) * 3).to(dtype).requires_grad_()
    scale = torch.full(shape, 0.0237).requires_grad_()
    zero = torch.full(shape, 120, dtype=torch.int32)
    out = fake_quantize(x, scale, zero, qtype)
    assert out.dtype == dtype
    reference = fake_quantize(x.detach().float(), scale.detach(), zero, qtype).to(dtype)
    assert torch.equal(out, reference)
    out.float().square().sum().backward()
    assert x.grad is not None and x.grad.dtype == dtype
    assert scale.grad is not None and scale.grad.dtype == torch.float32 and scale.grad.shape == scale.shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_codes_of_low_precision_input_are_those_of_its_float32_values(dtype: torch.dtype) -> None:
    torch.manual_seed(5)
    x = (torch.randn(1000) * 3).to(dtype)
    scale, zero = torch.tensor(0.0237), torch.tensor(120)
    assert torch.equal(quantize(x, scale, zero, QType(8)), quantize(x.float(), scale, zero, QType(8)))


def test_ties_go_to_the_even_level_and_division_is_not_a_product_with_the_reciprocal() -> None:
    one, zero = torch.tensor(1.0), torch.tensor(0)
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5])
    assert quantize(x, one, zero, QType(8, signed=True)).tolist() == [-2, -2, 0, 0, 2, 2, 4]
    # numpy's float32 division, value by value
    scale = np.float32(0.1)
    values = (np.arange(-2000, 2000, dtype=np.float32) + np.float32(0.5)) * scale
    levels = np.rint(values / scale).clip(-128, 127).astype(np.int32)
    assert (
        quantize(torch.from_numpy(values), torch.tensor(scale), zero, QType(8, signed=True)).tolist() == levels.tolist()
    )


def test_nan_stays_nan_and_infinities_saturate() -> None:
    x = torch.tensor([math.nan, math.inf, -math.inf])
    out = fake_quantize(x, torch.tensor(0.5), torch.tensor(3), QType(4))
    assert math.isnan(out[0]) and out[1:].tolist() == [6.0, -1.5]


@pytest.mark.parametrize(("lo", "hi"), [(0.5, 2.0), (-3.0, -1.0), (0.0, 0.0), (2.0, 2.0)])
def test_a_range_without_zero_is_widened_to_contain_it(lo: float, hi: float) -> None:
    qtype = QType(8)
    scale, zero = choose_qparams(torch.tensor(lo), torch.tensor(hi), qtype)
    assert scale > 0 and torch.isfinite(scale) and zero.dtype == torch.int32
    ends = dequantize(torch.tensor([qtype.qmin, qtype.qmax]), scale, zero)
    assert ends[0] <= 0 <= ends[1]
    if lo < hi:
        assert (ends[1] - ends[0]).item() == pytest.approx(max(hi, 0) - min(lo, 0))
