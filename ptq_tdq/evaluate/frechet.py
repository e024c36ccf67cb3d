"""The Frechet distance between two Gaussians (Dowson and Landau 1982), the form that FID (Heusel et al. 2017) uses.

Computed in other features than Inception's it is not an FID and must not be called one; in the embedded classifier's
features it is called FD-C10 here.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def feature_statistics(features: ArrayLike) -> tuple[Array, Array]:
    """Return the mean [D] and the unbiased covariance [D, D] of features [N, D], in float64; N must be at least 2."""
    values = np.asarray(features, np.float64)
    if values.ndim != 2 or len(values) < 2:
        raise ValueError(
            "The 'features' parameter of feature_statistics must have shape [N, D] with N >= 2. "
            f"Got {list(values.shape)} instead."
        )
    return values.mean(0), np.atleast_2d(np.cov(values, rowvar=False))


def frechet_distance(mean1: ArrayLike, cov1: ArrayLike, mean2: ArrayLike, cov2: ArrayLike) -> float:
    """Return |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of means [D] and covariances [D, D] (symmetric, semidefinite).

    tr (C1 C2)^(1/2) is the sum of the singular values of C1^(1/2) C2^(1/2): unlike a Schur-based matrix root this form
    stays real and accurate for singular covariances (fewer samples than features), so no offset is added.
    """
    m1, m2 = np.asarray(mean1, np.float64), np.asarray(mean2, np.float64)
    c1, c2 = np.asarray(cov1, np.float64), np.asarray(cov2, np.float64)
    shapes = (m1.shape, c1.shape, m2.shape, c2.shape)
    if m1.ndim != 1 or shapes != (m1.shape, 2 * m1.shape, m1.shape, 2 * m1.shape):
        raise ValueError(
            "The parameters of frechet_distance must have shapes [D], [D, D], [D], [D, D]. "
            f"Got {', '.join(str(list(shape)) for shape in shapes)} instead."
        )
    if not all(np.isfinite(part).all() for part in (m1, c1, m2, c2)):
        raise ValueError("The parameters of frechet_distance must be finite. Got NaN or Inf instead.")
    cross = np.linalg.svd(_root(c1) @ _root(c2), compute_uv=False).sum()
    distance = np.square(m1 - m2).sum() + np.trace(c1) + np.trace(c2) - 2 * cross
    return max(0.0, float(distance))


def _root(cov: Array) -> Array:
    """Return the symmetric square root of a semidefinite matrix; eigenvalues below zero are rounding and become 0."""
    values, vectors = np.linalg.eigh((cov + cov.T) / 2)
    return np.asarray((vectors * np.sqrt(values.clip(min=0))) @ vectors.T, np.float64)
