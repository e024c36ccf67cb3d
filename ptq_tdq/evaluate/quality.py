"""Quality of a set of samples in a feature space: metrics of feature rows, whatever network made them.

Features and logits are computed once per set; torchmetrics then gets them through an identity as its feature network.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from math import sqrt

import torch
from torch import Tensor, nn

from ptq_tdq.extras import missing

KID_SUBSETS, KID_SUBSET_SIZE = 10, 1000
NEIGHBOURS = 3


def require() -> None:
    """Import what the metrics need, before anything is sampled for them; raises as :func:`~ptq_tdq.extras.need`."""
    with _torchmetrics(0):
        import torchmetrics  # noqa: F401


def kid(real: Tensor, fake: Tensor, seed: int = 0) -> float:
    """Kernel distance of features [N, D] and [M, D] (KID, arXiv 1801.01401: cubic kernel, unbiased; may be below 0).

    The mean over 10 random subsets of min(N, M, 1000) rows, drawn with ``seed``.
    """
    with _torchmetrics(seed):
        from torchmetrics.image.kid import KernelInceptionDistance

        size = min(len(real), len(fake), KID_SUBSET_SIZE)
        metric = KernelInceptionDistance(feature=nn.Identity(), subsets=KID_SUBSETS, subset_size=size)
        metric.update(real.double(), real=True)
        metric.update(fake.double(), real=False)
        return float(metric.compute()[0])


def inception_score(logits: Tensor, seed: int = 0) -> float:
    """Inception Score of logits [N, K] (arXiv 1606.03498), over the whole set: small parts of it would be biased."""
    with _torchmetrics(seed):
        from torchmetrics.image.inception import InceptionScore

        metric = InceptionScore(feature=nn.Identity(), splits=1)
        metric.update(logits.double())
        return float(metric.compute()[0])


def precision_recall(real: Tensor, fake: Tensor, neighbours: int = NEIGHBOURS) -> tuple[float, float]:
    """Improved precision and recall (arXiv 1904.06991) of features [N, D] and [M, D]; torchmetrics has none.

    Precision is the share of fake rows inside the real manifold, recall that of real rows inside the fake one; a
    manifold is the union of balls around its rows that reach to their ``neighbours``-th nearest other row. Both depend
    on N and M: compare only sets of equal sizes.
    """
    between = torch.cdist(fake.double(), real.double())
    precision = (between <= _radii(real, neighbours)[None]).any(1)
    recall = (between <= _radii(fake, neighbours)[:, None]).any(0)
    return float(precision.double().mean()), float(recall.double().mean())


def _radii(rows: Tensor, neighbours: int) -> Tensor:
    if len(rows) <= neighbours:
        raise ValueError(f"Precision and recall need more than {neighbours} samples. Got {len(rows)} instead.")
    distances = torch.cdist(rows.double(), rows.double()).fill_diagonal_(torch.inf)
    return distances.kthvalue(neighbours, dim=1).values


def feature_distance(reference: Tensor, features: Tensor) -> float:
    """Root mean square distance of paired features [N, D], in units of that between two unrelated reference rows.

    0: no difference; 1: a sample is no closer to its own reference than to any other. N must be at least 2.
    """
    pairs = (reference.double() - features.double()).square().sum(1).mean()
    unrelated = 2 * reference.double().var(0).sum()
    return sqrt(float(pairs / unrelated)) if pairs else 0.0


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of rows [N, K] whose largest logit is at their label [N]."""
    return float((logits.argmax(1) == labels).double().mean())


@contextmanager
def _torchmetrics(seed: int) -> Iterator[None]:
    """Random subsets from ``seed``; no advice about memory; a missing package becomes one sentence."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        torch.manual_seed(seed)
        try:
            yield
        except ImportError as error:
            raise missing(error, "metrics") from None
