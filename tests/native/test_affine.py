"""C against the same in torch: results bit for bit, sums (gradients of scales, errors) up to their order."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from ptq_tdq import affine
from ptq_tdq.affine import fake_quantize
from ptq_tdq.native import affine as native
from ptq_tdq.scheme import QType
from ptq_tdq.search import POWER, interval_errors

FEW = native.FEW
ODD = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-45, 3.4e38, -3.4e38, 0.5, 1.5, 2.5, -0.5, -1.5])


@pytest.fixture(autouse=True)
def small_tensors_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "FEW", 1)
    if native._library() is None:
        pytest.skip("affine.c cannot be built here")


def both(monkeypatch: pytest.MonkeyPatch, run: Callable[[], Any]) -> tuple[Any, Any]:
    """What C gives, and what torch gives."""
    used: list[object] = []

    def watched(*args: Any) -> Any:
        used.append(found := native.grid_of(*args))
        return found

    with monkeypatch.context() as patch:
        patch.setattr(affine, "grid_of", watched)
        found = run()
    assert used and all(used), "C computed it"
    with monkeypatch.context() as patch:
        patch.setattr(affine, "grid_of", lambda *_: None)
        return found, run()


def learn(x: Tensor, scale: Tensor, zero_point: Tensor, qtype: QType, slope: Tensor) -> tuple[Tensor, ...]:
    x, scale = x.detach().requires_grad_(), scale.detach().requires_grad_()
    y = fake_quantize(x, scale, zero_point, qtype)
    return y.detach(), *torch.autograd.grad(y, (x, scale), slope)


def same(found: Tensor, expected: Tensor) -> bool:
    """Equal bits, but for NaN, of which there are many."""
    return torch.equal(found.isnan(), expected.isnan()) and torch.equal(found.nan_to_num(7), expected.nan_to_num(7))


SHAPES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "one scale": ((3, 5, 7), ()),
    "one scale of four dimensions": ((3, 5, 7, 2), (1, 1, 1, 1)),
    "samples": ((3, 5, 7), (3, 1, 1)),
    "tokens": ((3, 5, 7), (3, 5, 1)),
    "values": ((3, 5), (3, 5)),
    "a batch of one": ((1, 5, 7), (1, 5, 1)),
    "more than a piece": ((2, 3, 5000), (2, 1, 1)),
}


@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
@pytest.mark.parametrize("qtype", [QType(8), QType(4, signed=True), QType(2)], ids=str)
@pytest.mark.parametrize("case", SHAPES)
def test_what_c_computes_is_what_torch_does(
    case: str, qtype: QType, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    shape, scales = SHAPES[case]
    scale = torch.rand(scales) * 0.1 + 0.01
    zero_point = torch.randint(qtype.qmin, qtype.qmax + 1, scales).float()
    x, slope = ((torch.randn(shape) * size).to(dtype) for size in (1.0, 3.0))
    (y, of_x, of_scale), expected = both(monkeypatch, lambda: learn(x, scale, zero_point, qtype, slope))
    assert same(y, expected[0]) and y.dtype == dtype
    assert same(of_x, expected[1]) and of_x.dtype == dtype
    torch.testing.assert_close(of_scale, expected[2], rtol=1e-4, atol=1e-2)  # thousands of numbers, of both signs
    assert of_scale.shape == scale.shape


@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
def test_numbers_that_are_no_numbers_and_ties(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    x, one = ODD.repeat(9).to(dtype), torch.ones(())
    for zero_point in (torch.zeros(()), torch.tensor(3.0)):
        found, expected = both(monkeypatch, lambda z=zero_point: learn(x, one, z, QType(4), torch.ones_like(x)))
        assert same(found[0], expected[0]) and same(found[1], expected[1])
        assert found[2].isnan() and expected[2].isnan()


@given(st.lists(st.floats(width=32, allow_subnormal=True), min_size=1, max_size=70), st.floats(2**-20, 2**20, width=32))
def test_any_numbers(values: list[float], scale: float) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "FEW", 1)
        x, s = torch.tensor(values), torch.tensor(scale)
        found, expected = both(patch, lambda: fake_quantize(x, s, torch.tensor(100.0), QType(8)))
        assert same(found, expected)


LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "channels last": lambda: torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    "heads of an attention": lambda: torch.randn(2, 5, 3, 4).transpose(1, 2),
    "keys that are transposed": lambda: torch.randn(2, 5, 3, 4).permute(0, 2, 3, 1),
    "a part of a batch": lambda: torch.randn(4, 3, 4, 5)[1:3],
    "one pixel of channels last": lambda: torch.randn(2, 3, 1, 1).contiguous(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("each", [True, False], ids=["each sample", "one scale"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_stay(layout: str, each: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x = LAYOUTS[layout]()
    scale = torch.tensor([0.02, 0.3]).view(2, 1, 1, 1) if each else torch.tensor(0.02)
    zero_point, qtype = torch.full_like(scale, 9.0), QType(4)
    for slope in (torch.randn(x.shape), torch.ones(()).expand(x.shape)):  # in rows, and in no layout at all
        found, expected = both(monkeypatch, lambda g=slope: learn(x, scale, zero_point, qtype, g))
        assert found[0].stride() == x.stride()
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
        torch.testing.assert_close(found[2], expected[2])


def test_tensors_that_are_kept_elsewhere_for_the_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch's own hooks do: what comes back has other strides."""
    x, scale = torch.randn(2, 5, 3, 4).transpose(1, 2), torch.tensor([0.02, 0.3]).view(2, 1, 1, 1)
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: t.contiguous(), lambda t: t.clone())

    def run() -> tuple[Tensor, ...]:
        with hooks:
            return learn(x, scale, torch.zeros_like(scale), QType(4, signed=True), torch.randn(2, 3, 5, 4))

    found, expected = both(monkeypatch, lambda: (torch.manual_seed(1), run())[1])
    assert torch.equal(found[1], expected[1])
    torch.testing.assert_close(found[2], expected[2])


def test_sums_do_not_depend_on_threads() -> None:
    torch.manual_seed(0)
    x, scale = torch.randn(3, 100_000), torch.rand(3, 1) * 0.1
    slope, threads = torch.randn(3, 100_000), torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(learn(x, scale, torch.full_like(scale, 7.0), QType(4), slope))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))


def errors(x: Tensor, scale: Tensor, zero: Tensor, size: Tensor, counts: Tensor | None) -> tuple[Tensor, Tensor]:
    """What C and what torch find."""
    used: list[object] = []

    def watched(*args: Any) -> Any:
        used.append(found := interval_errors_in_c(*args))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "interval_errors", watched)
        found = interval_errors(x, scale, zero, QType(4), size, counts)
        patch.setattr(native, "interval_errors", lambda *_: None)
        assert isinstance(used[0], Tensor), "C computed it"
        return found, interval_errors(x, scale, zero, QType(4), size, counts)


interval_errors_in_c = native.interval_errors


@pytest.mark.parametrize("size", [1e-37, 0.01, 3.0, 3e38])
@pytest.mark.parametrize("counted", [True, False], ids=["counts", "values"])
@pytest.mark.parametrize("shape", [(3, 700), (2, 5000), (1, 1), (700,)], ids=str)
def test_errors_of_intervals(shape: tuple[int, ...], counted: bool, size: float) -> None:
    """A few bits of float32 beside a power in float64 of the same quantized values."""
    torch.manual_seed(0)
    groups = shape[0] if len(shape) > 1 else 3
    x = (torch.rand(shape) - 0.3) * size
    scale, zero = (torch.rand(5, groups) + 0.1) * size / 15, torch.randint(0, 16, (5, groups))
    counts = torch.randint(0, 9, (groups, shape[-1])).float() if counted else None
    sizes = torch.full((groups,), size)
    found, expected = errors(x, scale, zero, sizes, counts)
    rounded = fake_quantize(x[None], scale[..., None], zero[..., None], QType(4)).double()
    power = ((x.double() - rounded).abs() / size) ** POWER
    exact = (power if counts is None else power * counts).sum(-1)
    torch.testing.assert_close(found.double(), exact * (size / min(size, 2.0**126)) ** POWER, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-9)


def test_an_exact_interval_has_no_error_and_odd_numbers_have_none_that_counts() -> None:
    scale, zero, one = torch.tensor([[0.5], [0.4]]), torch.full((2, 1), 8), torch.ones(1)
    for found in errors(torch.arange(-4, 4)[None] * 0.5, scale, zero, one, None):
        assert found[0, 0] == 0 < found[1, 0]
    for value, expected in ((math.nan, math.nan), (math.inf, math.inf), (3e38, math.inf)):
        for found in errors(torch.tensor([[value, 1.0]]), scale, zero, one, None):
            torch.testing.assert_close(found, torch.full((2, 1), expected), equal_nan=True)


X, ONE = torch.randn(4, 6), torch.tensor(0.1)
LEFT: dict[str, tuple[Tensor, Tensor]] = {
    "float64": (X.double(), ONE),
    "float16": (X.half(), ONE),
    "a scale in float64": (X, ONE.double()),
    "gaps": (X[:, ::2], ONE),
    "a tensor that repeats": (X[:1].expand(4, 6), ONE),
    "scales of columns": (X, torch.rand(1, 6) + 0.1),
    "scales that make it larger": (X[:1], torch.rand(4, 1) + 0.1),
    "scales of more dimensions": (X, torch.rand(1, 1, 1) + 0.1),
    "scales with gaps": (X, (torch.rand(8, 1) + 0.1)[::2]),
    "no values": (X[:0], ONE),
    "the negative of what is there": (torch.imag(torch.randn(4, 6, dtype=torch.cfloat).conj()), ONE),
}


@pytest.mark.parametrize("case", LEFT)
def test_torch_takes_the_rest(case: str) -> None:
    x, scale = LEFT[case]
    zero_point = torch.zeros_like(scale)
    assert native.grid_of(x, scale, zero_point, -8, 7) is None
    expected = (torch.round(x.to(scale.dtype) / scale).clamp(-8, 7) * scale).to(x.dtype)
    torch.testing.assert_close(fake_quantize(x, scale, zero_point, QType(4, signed=True)), expected)


def test_zero_points_of_another_shape_are_left_to_torch() -> None:
    zero_point = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    assert native.grid_of(X, ONE.view(1, 1), zero_point, 0, 15) is None
    assert native.grid_of(X, torch.ones(4, 1), zero_point[:, 0], 0, 15) is None
    assert native.grid_of(X, torch.ones(4, 1), zero_point, 0, 15) is not None


def test_few_values_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "FEW", FEW)
    assert native.grid_of(torch.zeros(FEW - 1), ONE, ONE, 0, 15) is None
    assert native.grid_of(torch.zeros(FEW), ONE, ONE, 0, 15) is not None


class Quantizes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return fake_quantize(x, ONE, torch.zeros(()), QType(4, signed=True)) + 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    "trace",
    [
        lambda model, x: torch.export.export(model, (x,)).module(),
        lambda model, x: torch.compile(model, backend="eager", fullgraph=True),
        lambda model, x: torch.jit.trace(model, x),
    ],
    ids=["export", "compile", "jit"],
)
def test_what_torch_traces_computes_on_other_values(trace: Callable[[nn.Module, Tensor], Any]) -> None:
    model, other = Quantizes(), torch.randn(4, 6)
    with torch.no_grad():
        assert torch.equal(trace(model, X)(other), model(other))


def test_without_a_compiler_torch_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    native._library.cache_clear()
    try:
        with monkeypatch.context() as patch:
            patch.setenv("PTQ_TDQ_NATIVE", "0")
            assert native.grid_of(X, ONE, ONE, 0, 15) is None
    finally:
        native._library.cache_clear()
