"""Metrics of feature sets against other implementations, closed forms and identities."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial import cKDTree
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from ptq_tdq.evaluate.frechet import feature_statistics, frechet_distance
from ptq_tdq.evaluate.quality import accuracy, feature_distance, inception_score, kid, precision_recall


def rows(seed: int, count: int = 60, size: int = 5, shift: float = 0.0) -> Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


class Flat(nn.Module):
    """A feature network without weights."""

    num_features = 12

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)


def test_the_frechet_distance_is_that_of_torchmetrics_with_a_feature_network_of_our_own() -> None:
    """torchmetrics' custom feature network works without torch-fidelity."""
    real, fake = (rows(seed, 200, 12, shift).view(-1, 3, 2, 2) for seed, shift in ((0, 0.0), (1, 0.5)))
    metric = FrechetInceptionDistance(feature=Flat(), normalize=True).set_dtype(torch.float64)
    metric.update(real, real=True)
    metric.update(fake, real=False)
    mine = frechet_distance(*feature_statistics(real.flatten(1)), *feature_statistics(fake.flatten(1)))
    assert mine == pytest.approx(float(metric.compute()), rel=1e-9)


def test_kid_is_the_unbiased_mmd_of_the_cubic_kernel() -> None:
    real, fake = rows(0, 40).numpy(), rows(1, 40, shift=0.7).numpy()

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.asarray((a @ b.T / a.shape[1] + 1) ** 3)

    n = len(real)
    same = sum((k.sum() - np.trace(k)) / (n * (n - 1)) for k in (kernel(real, real), kernel(fake, fake)))
    expected = same - 2 * kernel(real, fake).mean()
    assert kid(torch.from_numpy(real), torch.from_numpy(fake)) == pytest.approx(expected, rel=1e-9)


def test_kid_of_unequal_sets_draws_its_subsets_by_the_seed_and_leaves_the_global_generator_alone() -> None:
    real, fake = rows(0, 50), rows(1, 30)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, again, other = kid(real, fake, 0), kid(real, fake, 0), kid(real, fake, 1)
    assert first == again != other
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("classes", [2, 10])
def test_inception_score_of_certain_classes_is_their_number_and_of_no_opinion_1(classes: int) -> None:
    certain = 100.0 * torch.eye(classes).repeat(3, 1)
    assert inception_score(certain) == pytest.approx(classes)
    assert inception_score(torch.zeros(30, classes)) == pytest.approx(1.0)


def test_inception_score_is_the_exponential_of_the_mutual_information() -> None:
    logits = rows(4, 80, 6)
    p = torch.softmax(logits, 1)
    entropy = -(p.mean(0) * p.mean(0).log()).sum() + (p * p.log()).sum(1).mean()
    assert inception_score(logits) == pytest.approx(float(entropy.exp()), rel=1e-9)


def test_precision_and_recall_of_a_set_with_itself_are_1_and_of_distant_sets_0() -> None:
    real = rows(0)
    assert precision_recall(real, real) == (1.0, 1.0)
    assert precision_recall(real, real + 1000) == (0.0, 0.0)


def test_half_the_samples_far_off_halve_precision_and_half_the_modes_missing_halve_recall() -> None:
    first, second = rows(0), rows(1, shift=500.0)
    both = torch.cat([first, second])
    astray = torch.cat([first, rows(2, shift=-500.0)])
    assert precision_recall(first, astray)[0] == 0.5
    assert precision_recall(both, first) == (1.0, 0.5)


def test_precision_and_recall_change_places_with_their_sets() -> None:
    real, fake = rows(0, 40), rows(1, 40, shift=0.5)
    assert precision_recall(real, fake) == precision_recall(fake, real)[::-1]


@pytest.mark.parametrize("neighbours", [1, 3])
def test_precision_by_a_search_tree(neighbours: int) -> None:
    real, fake = rows(0).numpy(), rows(1, shift=0.8).numpy()
    radii = cKDTree(real).query(real, neighbours + 1)[0][:, -1]
    inside = [any(np.linalg.norm(x - r) <= radius for r, radius in zip(real, radii, strict=True)) for x in fake]
    found, _ = precision_recall(torch.from_numpy(real), torch.from_numpy(fake), neighbours)
    assert found == pytest.approx(np.mean(inside)) and 0 < found < 1


def test_too_few_samples_for_a_neighbour_are_refused() -> None:
    with pytest.raises(ValueError, match="more than 3 samples"):
        precision_recall(rows(0, 3), rows(1, 10))


def test_feature_distance_is_0_for_equal_pairs_and_1_for_unrelated_ones() -> None:
    x = rows(0, 4000)
    assert feature_distance(x, x) == 0
    assert feature_distance(x, rows(1, 4000)) == pytest.approx(1, abs=0.02)
    assert feature_distance(7 * x + 3, 7 * x + 3 + 7 * 0.1) == pytest.approx(feature_distance(x, x + 0.1))


def test_accuracy_counts_the_largest_logit() -> None:
    logits = torch.tensor([[0.0, 2.0], [3.0, 1.0], [0.0, 1.0], [0.5, 0.0]])
    assert accuracy(logits, torch.tensor([1, 0, 0, 1])) == 0.5
