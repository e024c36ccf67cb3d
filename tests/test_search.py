"""The interval search against an independent float64 search in numpy, and against scipy's continuous minimum."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from torch import Tensor

from ptq_tdq.observe import Observer
from ptq_tdq.scheme import QType
from ptq_tdq.search import Histogram, activation_qparams, row_qparams

Array = NDArray[np.float64]


def error(x: Array, scale: float, zero: float, qtype: QType) -> float:
    """Mean of |x - x_hat|^2.4 (method section 3.2)."""
    codes = np.clip(np.rint(x / scale) + zero, qtype.qmin, qtype.qmax)
    return float(np.mean(np.abs(x - scale * (codes - zero)) ** 2.4))


def affine(x: Array, qtype: QType, *, from_zero: bool = False) -> Callable[[float], tuple[float, float]]:
    """Scale and zero point of the range of ``x``, shrunk by a factor."""
    lo, hi = (0.0 if from_zero else min(x.min(), 0.0)), max(x.max(), 0.0)

    def place(factor: float) -> tuple[float, float]:
        scale = factor * (hi - lo) / (qtype.qmax - qtype.qmin)
        return scale, float(np.clip(qtype.qmin - np.rint(lo * factor / scale), qtype.qmin, qtype.qmax))

    return place


def best(x: Array, qtype: QType, place: Callable[[float], tuple[float, float]]) -> tuple[float, float]:
    """Least error over the factors 1, 0.99, ..., 0.21, and over all factors in between (scipy)."""
    grid = min(error(x, *place(1 - 0.01 * i), qtype) for i in range(80))
    free = min(
        minimize_scalar(
            lambda f: error(x, *place(f), qtype), bounds=(start, start + 0.1), method="bounded", options={"xatol": 1e-4}
        ).fun
        for start in np.arange(0.2, 0.95, 0.1)
    )
    return grid, free


def data(kind: str, rows: int, columns: int) -> Tensor:
    generator = np.random.default_rng(7)
    x = {
        "normal": generator.normal(size=(rows, columns)),
        "heavy": generator.standard_t(4, size=(rows, columns)),
        "skewed": generator.gamma(2.0, size=(rows, columns)) - 0.5,
        "positive": generator.uniform(0.1, 3.0, size=(rows, columns)),
    }[kind]
    return torch.from_numpy(x * np.geomspace(0.01, 10, rows)[:, None]).float()


@pytest.mark.parametrize("kind", ["normal", "heavy", "skewed", "positive"])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_weights_get_the_best_of_the_grid_and_nearly_the_best_of_all(kind: str, bits: int, symmetric: bool) -> None:
    qtype = QType(bits)
    rows = data(kind, 3, 600)
    found = row_qparams(rows, qtype, symmetric=symmetric)
    assert found.scale.shape == found.zero_point.shape == (3,)
    for row, scale, zero in zip(rows.double().numpy(), found.scale.tolist(), found.zero_point.tolist(), strict=True):
        place = affine(row, qtype)
        if symmetric:
            middle = 2 ** (bits - 1)
            assert zero == middle
            bound = max(-row.min() / middle, row.max() / (middle - 1))
            place = lambda factor, bound=bound, middle=middle: (factor * bound, middle)  # noqa: E731
        grid, free = best(row, qtype, place)
        assert error(row, scale, zero, qtype) <= grid * 1.0001
        if bits < 8:  # 256 levels for 600 values: the free minimum is a chance hit of single values
            assert error(row, scale, zero, qtype) <= free * 1.03


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_each_channel_is_searched_as_if_alone(bits: int) -> None:
    rows = data("heavy", 4, 200)
    together = row_qparams(rows, QType(bits))
    for i, row in enumerate(rows):
        alone = row_qparams(row[None], QType(bits))
        assert alone.scale[0] == together.scale[i] and alone.zero_point[0] == together.zero_point[i]


def test_min_max_covers_the_range() -> None:
    rows = data("skewed", 3, 500)
    found = row_qparams(rows, QType(4), method="minmax")
    width = rows.amax(1).clamp(min=0) - rows.amin(1).clamp(max=0)
    torch.testing.assert_close(found.scale, width / 15)


def histogram(x: Tensor, t: Tensor) -> Histogram:
    observer = Observer("x", t.unique())
    observer.see(x, t)
    observer.start_counting()
    observer.see(x, t)
    return observer.histogram()


@pytest.mark.parametrize("kind", ["normal", "heavy", "skewed", "positive"])
@pytest.mark.parametrize("bits", [2, 4, 6, 8])
def test_activations_get_almost_the_best_of_the_grid_on_the_raw_values(kind: str, bits: int) -> None:
    """The 2048 bins span all steps: a step with a small range is resolved less finely than its raw values."""
    qtype = QType(bits)
    x = data(kind, 1, 4 * 3000).view(4, 3000) * torch.tensor([1.0, 1.5, 2.0, 3.0])[:, None]
    found = activation_qparams(histogram(x, torch.tensor([0.0, 10.0, 20.0, 30.0])), qtype)
    for row, scale, zero in zip(x.double().numpy(), found.scale.tolist(), found.zero_point.tolist(), strict=True):
        grid, _ = best(row, qtype, affine(row, qtype))
        assert error(row, scale, zero, qtype) <= grid * 1.02


def silu(rows: int) -> Tensor:
    x = (
        torch.from_numpy(np.random.default_rng(3).normal(size=(rows, 4000))).float()
        * torch.arange(1.0, rows + 1)[:, None]
    )
    return torch.nn.functional.silu(x)


@pytest.mark.parametrize("bits", [3, 4, 6])
@pytest.mark.parametrize(
    "x", [silu(3), data("normal", 3, 4000), data("skewed", 3, 4000)], ids=["silu", "normal", "skewed"]
)
def test_ends_that_move_apart_are_nearly_the_best_of_all_pairs_of_ends(x: Tensor, bits: int) -> None:
    qtype, t = QType(bits), torch.arange(3.0)
    x = x / x.abs().amax(1, keepdim=True)
    apart, both = (activation_qparams(histogram(x, t), qtype, method=method) for method in ("mse-ends", "mse"))
    for i, row in enumerate(x.double().numpy()):
        ours, joint = (error(row, found.scale[i].item(), found.zero_point[i].item(), qtype) for found in (apart, both))
        pairs = np.array(np.meshgrid(np.linspace(0.1, 1, 60), np.linspace(0.1, 1, 60))).reshape(2, -1).T
        ranges = [(row.min() * low, row.max() * high) for low, high in pairs]
        scales = [((hi - lo) / qtype.qmax) for lo, hi in ranges]
        all_pairs = min(
            error(row, scale, -np.rint(lo / scale), qtype) for (lo, _), scale in zip(ranges, scales, strict=True)
        )
        assert ours <= min(joint * 1.001, all_pairs * 1.05)


def test_ends_that_move_apart_keep_the_negative_tail_of_a_silu() -> None:
    """One factor for both ends gives up the tail, which is dense, together with the rare large values."""
    x, qtype = silu(4), QType(6)
    found = activation_qparams(histogram(x, torch.arange(4.0)), qtype, method="mse-ends")
    low = -found.scale * found.zero_point
    assert ((low + 0.2785).abs() <= 0.6 * found.scale).all()


def test_softmax_codes_start_at_zero() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3000).mul(2).softmax(-1) + 0.01
    found = activation_qparams(histogram(x, torch.tensor([1.0, 2.0])), QType(4), from_zero=True)
    assert found.zero_point.tolist() == [0, 0]
    for row, scale in zip(x.double().numpy(), found.scale.tolist(), strict=True):
        grid, _ = best(row, QType(4), affine(row, QType(4), from_zero=True))
        assert error(row, scale, 0, QType(4)) <= grid * 1.03


@pytest.mark.parametrize("zero", [0, 3, 8, 15])
def test_a_given_zero_point_is_kept_and_its_scale_is_the_best_of_the_grid(zero: int) -> None:
    qtype = QType(4)
    x = data("normal", 1, 4000)
    found = activation_qparams(histogram(x, torch.tensor([5.0])), qtype, zero_point=torch.tensor(zero))
    assert found.zero_point.tolist() == [zero]
    row = x[0].double().numpy()
    bound = max(row.max() / (15 - zero) if zero < 15 else 0.0, -row.min() / zero if zero else 0.0)
    grid, _ = best(row, qtype, lambda factor: (factor * bound, zero))
    assert error(row, found.scale.item(), zero, qtype) <= grid * 1.02


def test_constant_zero_gives_a_finite_positive_scale() -> None:
    found = activation_qparams(histogram(torch.zeros(1, 50), torch.tensor([0.0])), QType(8))
    assert torch.isfinite(found.scale).all() and (found.scale > 0).all()
    found = row_qparams(torch.zeros(2, 50), QType(4))
    assert torch.isfinite(found.scale).all() and (found.scale > 0).all()


def test_pooling_is_the_histogram_of_all_samples_of_the_group() -> None:
    x, t = data("normal", 1, 6000).view(6, 1000), torch.arange(6.0)
    steps = histogram(x, t)
    pooled = steps.pooled(torch.tensor([0, 0, 2, 2, 2, 0]), 3)
    for group, members in enumerate([[0, 1, 5], [], [2, 3, 4]]):
        assert torch.equal(pooled.counts[group], steps.counts[members].sum(0))
        if members:
            assert pooled.lo[group] == x[members].min() and pooled.hi[group] == x[members].max()


def test_pooling_each_step_alone_changes_nothing_and_pooling_twice_is_pooling_once() -> None:
    steps = histogram(data("heavy", 1, 4000).view(4, 1000), torch.arange(4.0))

    def same(a: Histogram, b: Histogram) -> bool:
        return all(torch.equal(getattr(a, k), getattr(b, k)) for k in ("counts", "centres", "lo", "hi"))

    assert same(steps.pooled(torch.arange(4), 4), steps)
    halves = steps.pooled(torch.tensor([0, 0, 1, 1]), 2)
    assert same(halves.pooled(torch.tensor([0, 0]), 1), steps.pooled(torch.zeros(4, dtype=torch.int64), 1))


@pytest.mark.parametrize("power", [-100, -60, 60, 100])
def test_the_unit_of_the_values_does_not_matter(power: int) -> None:
    """The power 2.4 of an error would leave float32 long before the error itself."""
    x, unit = data("skewed", 3, 500), 2.0**power
    for method in ("mse", "mse-ends"):
        if method == "mse":
            plain, scaled = row_qparams(x, QType(4)), row_qparams(x * unit, QType(4))
            assert torch.equal(plain.scale * unit, scaled.scale) and torch.equal(plain.zero_point, scaled.zero_point)
        steps = [activation_qparams(histogram(x * u, torch.arange(3.0)), QType(4), method=method) for u in (1.0, unit)]
        assert torch.equal(steps[0].scale * unit, steps[1].scale)
        assert torch.equal(steps[0].zero_point, steps[1].zero_point)
