"""Each quantizer's values and gradients against its paper's equations, by numpy and by torch's own operators."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from ptq_tdq.affine import dequantize, quantize
from ptq_tdq.errors import ConfigError
from ptq_tdq.finetuning.quantizers import Quantizer, quantizer_class
from ptq_tdq.finetuning.quantizers.pact import DECAY
from ptq_tdq.rounding import LearnedWeight
from ptq_tdq.scheme import QType

QTYPE = QType(4)
SCALE, ZERO = torch.tensor([0.1, 0.23, 0.4]), torch.tensor([0, 7, 15], dtype=torch.int32)  # of three samples


def batch(values: int = 4000) -> Tensor:
    return torch.randn(3, values, generator=torch.Generator().manual_seed(0)) * 1.3


def gradients(function: Quantizer, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, the gradient that it was given, and those of x and of the scale [3]."""
    x, scale = x.clone().requires_grad_(), SCALE.clone().requires_grad_()
    out = function(x, scale[:, None], ZERO[:, None], QTYPE)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    out.backward(grad)
    assert x.grad is not None and scale.grad is not None
    return out.detach(), grad, x.grad, scale.grad


def codes(x: Tensor) -> Tensor:
    return dequantize(quantize(x, SCALE[:, None], ZERO[:, None], QTYPE), SCALE[:, None], ZERO[:, None])


def clipped(x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Where x is below and above the range of the codes, exactly."""
    s, z = SCALE[:, None].double().numpy(), ZERO[:, None].numpy()
    return x.numpy() < -s * z, x.numpy() > s * (15 - z)


def test_lsq_is_torchs_learnable_fake_quantization() -> None:
    x = batch()
    out, grad, grad_x, grad_scale = gradients(quantizer_class("lsq")(), x)
    mine, scale = x.clone().requires_grad_(), SCALE.clone().requires_grad_()
    factor = (x.shape[1] * 15) ** -0.5  # equation 3 and section 2.2
    theirs = torch._fake_quantize_learnable_per_channel_affine(mine, scale, ZERO.float(), 0, 0, 15, factor)
    theirs.backward(grad)
    torch.testing.assert_close(out, theirs.detach())
    torch.testing.assert_close(grad_x, mine.grad)
    torch.testing.assert_close(grad_scale, scale.grad, rtol=1e-4, atol=1e-5)


def test_a_learned_weight_is_torchs_learnable_fake_quantization_from_the_given_codes() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, scale = torch.randn(5, 6, 3, 3, generator=generator), torch.rand(5, generator=generator) * 0.2 + 0.1
    zero = torch.tensor([0, 3, 8, 8, 15], dtype=torch.int32)
    grid = scale.view(-1, 1, 1, 1), zero.view(-1, 1, 1, 1)
    given = (quantize(weight, *grid, QTYPE) + torch.randint(-1, 2, weight.shape, generator=generator)).clamp(0, 15)
    learned = LearnedWeight(weight, given, *grid, QTYPE)
    assert torch.equal(learned.hard_codes(), given.to(torch.int32))
    torch.testing.assert_close(learned.soft_weight(), dequantize(given, *grid))
    near = (weight / grid[0] + grid[1] - given).abs() < 0.1
    torch.testing.assert_close(learned.weight[near], weight[near])
    grad = torch.randn(weight.shape, generator=generator)
    learned.soft_weight().backward(grad)
    mine, theirs = learned.weight.detach().clone().requires_grad_(), scale.clone().requires_grad_()
    factor = (weight[0].numel() * 15) ** -0.5
    torch._fake_quantize_learnable_per_channel_affine(mine, theirs, zero.float(), 0, 0, 15, factor).backward(grad)
    assert theirs.grad is not None and learned.log_scale.grad is not None
    torch.testing.assert_close(learned.weight.grad, mine.grad)
    torch.testing.assert_close(learned.log_scale.grad.flatten(), theirs.grad * scale, rtol=1e-4, atol=1e-6)


def test_pact_learns_its_range_from_clipped_values_alone() -> None:
    x, function = batch(), quantizer_class("pact")()
    out, grad, grad_x, grad_scale = gradients(function, x)
    assert torch.equal(out, codes(x))
    (below, above), g, z = clipped(x), grad.numpy(), ZERO.numpy()
    np.testing.assert_allclose(grad_x, np.where(below | above, 0, g))
    expected = (g * above).sum(1) * (15 - z) + (g * below).sum(1) * (0 - z)
    np.testing.assert_allclose(grad_scale, expected, rtol=1e-4, atol=1e-3)


def test_pact_behind_a_relu_is_the_papers() -> None:
    """d y / d alpha = 1 where x >= alpha (equation 3), and L2 on alpha."""
    alpha, x = 1.5, batch().relu()[:1]
    scale = torch.tensor(alpha / 15, requires_grad=True)
    function = quantizer_class("pact")()
    function(x, scale, torch.tensor(0), QTYPE).sum().backward(retain_graph=True)
    assert scale.grad is not None and function.penalty is not None
    assert float(scale.grad / 15) == pytest.approx(float((x >= alpha).sum()))  # d alpha = 15 d scale
    scale.grad = None
    function.penalty.backward()
    assert function.penalty.item() == pytest.approx(DECAY * alpha**2)
    assert float(scale.grad / 15) == pytest.approx(2 * DECAY * alpha)


def test_nipq_adds_uniform_noise_of_one_step_inside_the_range() -> None:
    x, function = batch(), quantizer_class("nipq")()
    torch.manual_seed(3)
    out, grad, grad_x, grad_scale = gradients(function, x)
    below, above = clipped(x)
    low, high = -SCALE * ZERO, SCALE * (15 - ZERO)
    for row in range(3):
        assert (out[row][below[row]] == low[row]).all() and (out[row][above[row]] == high[row]).all()
        inside = ~(below | above)[row]
        noise = ((out - x)[row][inside] / SCALE[row]).numpy()
        assert stats.kstest(noise, "uniform", (-0.5, 1)).pvalue > 1e-3
        assert abs(np.corrcoef(noise, x[row][inside].numpy())[0, 1]) < 0.08
        level = np.where(below[row], -int(ZERO[row]), 15 - int(ZERO[row]))
        slope = np.where(inside, ((out - x)[row] / SCALE[row]).numpy(), level)
        assert float(grad_scale[row]) == pytest.approx((grad[row].numpy() * slope).sum(), rel=1e-3, abs=1e-2)
    np.testing.assert_allclose(grad_x, np.where(below | above, 0, grad.numpy()))


def test_nipq_ends_with_the_codes_and_a_scale_that_learns_no_more() -> None:
    x, function, scale = batch().requires_grad_(), quantizer_class("nipq")(), SCALE.clone().requires_grad_()
    function.frozen = True
    out = function(x, scale[:, None], ZERO[:, None], QTYPE)
    assert torch.equal(out.detach(), codes(x.detach()))
    out.sum().backward()
    assert scale.grad is None and x.grad is not None


def test_duq_rounds_in_steps_of_a_and_stands_for_steps_of_b() -> None:
    """x_hat = b round(clip(x / a, 0, 1) n) / n, here with b = 1.3 a, and its gradients through round as identity."""
    x, function = batch().requires_grad_(), quantizer_class("duq")(absorbs=True)
    assert function.ratio is not None
    with torch.no_grad():
        function.ratio.copy_(torch.tensor(1.3).log())
    a, n = 1.8, 15
    scale = torch.tensor(a / n, requires_grad=True)
    out = function(x, scale, torch.tensor(0), QTYPE)
    values = x.detach().double().numpy()
    inner = np.clip(values / a, 0, 1)
    np.testing.assert_allclose(out.detach(), 1.3 * a * np.round(inner * n) / n, atol=1e-5)
    out.sum().backward()
    assert scale.grad is not None and x.grad is not None and function.ratio.grad is not None
    # with b = r a: d x_hat / d r = a q / n, and d x_hat / d a = r q / n - r x / a where nothing is clipped
    q = np.round(inner * n) / n
    rounded = np.abs(np.clip(np.round(values / a * n), 0, n) - values / a * n) <= 0.5
    assert float(function.ratio.grad) == pytest.approx((1.3 * a * q).sum(), rel=1e-4)
    expected = np.where(rounded, 1.3 * (q - values / a), 1.3 * q).sum()
    assert float(scale.grad / n) == pytest.approx(expected, rel=1e-3)
    np.testing.assert_allclose(x.grad, 1.3 * rounded, atol=1e-6)


def test_duq_without_a_weight_behind_it_is_lsq() -> None:
    function = quantizer_class("duq")()
    assert function.ratio is None
    assert torch.equal(gradients(function, batch())[0], codes(batch()))


def test_qil_learns_centre_and_half_width_by_what_its_codes_stand_for() -> None:
    """x_hat = clip((x - (c - d)) / (2 d), 0, 1) in n steps and its derivatives by c and d (Jung et al., section 3), and
    those of 2 d x_hat + (c - d): what a wider interval takes from x_hat, its codes give back.
    """
    x, function, n = batch().requires_grad_(), quantizer_class("qil")(), 15
    assert function.shift is not None
    with torch.no_grad():
        function.shift.fill_(0.3)  # 2.25 codes: z goes from 7 to 5
    scale = torch.tensor(0.23, requires_grad=True)
    out = function(x, scale, torch.tensor(7, dtype=torch.int32), QTYPE)
    values, d = x.detach().double().numpy(), 0.23 * n / 2
    c = 0.23 * (n / 2 - 5)
    x_hat = np.clip((values - (c - d)) / (2 * d), 0, 1)
    np.testing.assert_allclose(out.detach(), 2 * d * np.round(x_hat * n) / n + (c - d), atol=1e-5)
    out.backward(torch.ones_like(out))
    assert scale.grad is not None and x.grad is not None and function.shift.grad is not None
    inside = np.abs(values - c) <= d
    by_c = 1 - 2 * d * inside / (2 * d)
    by_d = 2 * np.round(x_hat * n) / n - 1 - 2 * d * inside * (values - c) / (2 * d**2)
    # c = s (n / 2 - z) + shift d, d = s n / 2
    assert float(function.shift.grad) == pytest.approx((by_c * d).sum(), rel=1e-4)
    assert float(scale.grad) == pytest.approx((by_c * (n / 2 - 5) + by_d * n / 2).sum(), rel=1e-4)
    np.testing.assert_allclose(x.grad, inside)  # 2 d / (2 d)


def test_qil_keeps_its_zero_points_among_the_codes() -> None:
    function = quantizer_class("qil")()
    assert function.shift is not None
    with torch.no_grad():
        function.shift.fill_(-0.4)  # three codes
    assert function.moved(ZERO, QTYPE).tolist() == [3, 10, 15]
    held = quantizer_class("qil")(held=True)
    assert held.shift is None
    assert torch.equal(gradients(held, batch())[0], codes(batch()))


def test_an_unknown_quantizer_is_one_sentence() -> None:
    with pytest.raises(ConfigError, match=r"must be one of duq, lsq, nipq, pact, qil\. Got 'dorefa'"):
        quantizer_class("dorefa")
