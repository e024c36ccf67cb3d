"""The real side of the -C10 metrics, as it ships with the embedded model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ptq_tdq.calib_data.reference import (
    reference_features,
    reference_path,
    reference_statistics,
    second_statistics,
)
from ptq_tdq.evaluate import c10
from ptq_tdq.evaluate.frechet import feature_statistics, frechet_distance
from ptq_tdq.evaluate.quality import kid


def test_the_stored_features_are_a_sample_of_what_the_statistics_describe() -> None:
    """Each coordinate's mean lies within 5 standard errors, and the classifier's head knows the classes in turn."""
    features, (mean, cov) = reference_features(), reference_statistics()
    assert features.shape == (1000, 256) and features.dtype == np.float32
    error = np.sqrt(np.diag(cov) / len(features))
    assert (np.abs(features.mean(0) - mean) <= 5 * error + 1e-4).all()
    logits = c10.load_classifiers().first.head(torch.from_numpy(features))
    assert (logits.argmax(1) == torch.arange(10).repeat(100)).double().mean() > 0.85


def test_half_of_the_real_features_is_close_to_the_other_half() -> None:
    """The measures' own floor at this number of images, far below what samples of the model reach (FD-C10 1.8)."""
    features = torch.from_numpy(reference_features())
    first, second = features[:500], features[500:]
    assert abs(kid(first, second)) < 1e-3
    assert frechet_distance(*feature_statistics(first), *reference_statistics()) < 0.3


def test_the_file_is_small() -> None:
    assert Path(reference_path() / "cifar10_train_sample.safetensors").stat().st_size < 600_000


def test_describe_gives_features_and_logits_of_the_classifier_whatever_the_batch() -> None:
    images = torch.rand(c10.BATCH + 3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    classifiers = c10.load_classifiers()
    found = c10.describe(classifiers, images)
    torch.testing.assert_close(found.features, classifiers.first.features(images), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.logits, classifiers.first(images), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.second, classifiers.second.features(images), rtol=1e-4, atol=1e-5)


def test_noise_is_further_from_the_data_than_real_features_and_seldom_of_the_class() -> None:
    classifiers, labels = c10.load_classifiers(), torch.arange(200) % 10
    noise = torch.rand(200, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    bad = c10.against_data(c10.describe(classifiers, noise), labels)
    real = torch.from_numpy(reference_features()[:200])
    mean, cov = second_statistics()
    second = torch.from_numpy(np.random.default_rng(0).multivariate_normal(mean, cov, 200)).float()
    good = c10.against_data(c10.Described(real, classifiers.first.head(real), second), labels)
    assert bad["fd_c10"] > 10 * good["fd_c10"] and bad["kid_c10"] > good["kid_c10"]
    assert bad["fd_c10_second"] > 10 * good["fd_c10_second"]
    assert bad["precision_c10"] < good["precision_c10"] == 1.0
    assert bad["class_accuracy"] < 0.3 < 0.8 < good["class_accuracy"]
    assert bad["is_c10"] < good["is_c10"] <= 10


def test_against_full_precision_nothing_differs_from_itself() -> None:
    features = torch.randn(50, 256, generator=torch.Generator().manual_seed(0))
    found = c10.Described(features, c10.load_classifiers().first.head(features), features)
    same = c10.against_full_precision(found, found)
    assert same == pytest.approx(
        {
            "feature_distance_c10": 0,
            "fd_c10_to_full_precision": 0,
            "fd_c10_second_to_full_precision": 0,
            "class_agreement": 1,
        },
        abs=1e-6,
    )
