"""The Frechet distance of Gaussians: its identities and the closed forms that the literature gives."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.linalg import sqrtm

from ptq_tdq.evaluate.frechet import Array, feature_statistics, frechet_distance


def gaussian(seed: int, size: int = 6, samples: int = 40) -> tuple[Array, Array]:
    generator = np.random.default_rng(seed)
    return feature_statistics(generator.normal(size=(samples, size)) @ generator.normal(size=(size, size)))


def test_a_gaussian_is_at_distance_zero_from_itself() -> None:
    assert frechet_distance(*gaussian(0), *gaussian(0)) == pytest.approx(0, abs=1e-9)


def test_it_is_symmetric() -> None:
    assert frechet_distance(*gaussian(0), *gaussian(1)) == pytest.approx(frechet_distance(*gaussian(1), *gaussian(0)))


def test_a_shift_of_the_mean_costs_its_squared_length() -> None:
    mean, cov = gaussian(2)
    assert frechet_distance(mean, cov, mean + 3, cov) == pytest.approx(9 * len(mean))


def test_diagonal_gaussians_have_a_closed_form() -> None:
    mean1, mean2 = np.array([0.0, 1.0, 2.0]), np.array([1.0, 1.0, 0.0])
    sigma1, sigma2 = np.array([1.0, 2.0, 0.0]), np.array([3.0, 0.5, 1.5])
    expected = np.square(mean1 - mean2).sum() + np.square(sigma1 - sigma2).sum()
    assert frechet_distance(mean1, np.diag(sigma1**2), mean2, np.diag(sigma2**2)) == pytest.approx(expected)


def test_a_rotation_of_both_changes_nothing() -> None:
    (mean1, cov1), (mean2, cov2) = gaussian(3), gaussian(4)
    q, _ = np.linalg.qr(np.random.default_rng(5).normal(size=cov1.shape))
    rotated = frechet_distance(q @ mean1, q @ cov1 @ q.T, q @ mean2, q @ cov2 @ q.T)
    assert rotated == pytest.approx(frechet_distance(mean1, cov1, mean2, cov2))


def test_it_agrees_with_the_matrix_root_of_the_usual_implementation() -> None:
    (mean1, cov1), (mean2, cov2) = gaussian(6), gaussian(7)
    root = np.real(sqrtm(cov1 @ cov2))
    expected = np.square(mean1 - mean2).sum() + np.trace(cov1 + cov2 - 2 * root)
    assert frechet_distance(mean1, cov1, mean2, cov2) == pytest.approx(float(expected))


def test_fewer_samples_than_features_is_no_problem() -> None:
    few, many = gaussian(8, size=64, samples=10), gaussian(9, size=64, samples=500)
    assert frechet_distance(*few, *few) == pytest.approx(0, abs=1e-6)
    assert np.isfinite(frechet_distance(*few, *many))


def test_statistics_are_those_of_numpy() -> None:
    mean, cov = feature_statistics([[1.0, 2.0], [3.0, 6.0]])
    np.testing.assert_array_equal(mean, [2.0, 4.0])
    np.testing.assert_array_equal(cov, [[2.0, 4.0], [4.0, 8.0]])


@pytest.mark.parametrize("features", [[[1.0, 2.0]], [1.0, 2.0, 3.0]])
def test_statistics_need_two_samples_in_a_matrix(features: list[float]) -> None:
    with pytest.raises(ValueError, match="N >= 2"):
        feature_statistics(features)


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[D\], \[D, D\]"):
        frechet_distance(np.zeros(3), np.eye(3), np.zeros(2), np.eye(2))


def test_nan_is_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        frechet_distance([np.nan], [[1.0]], [0.0], [[1.0]])
