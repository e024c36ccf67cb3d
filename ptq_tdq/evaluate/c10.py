"""Sample quality in features of the embedded CIFAR-10 classifiers; each number is called -C10, never by Inception's.

The real side of FD-C10 are the statistics of the 50,000 training images, that of KID-C10, precision and recall the
stored features of 1,000 of them (100 of each class). The decoder that both embedded models share was trained in feature
maps of the first classifier: these numbers compare quantizations of an embedded model and nothing else. The second, of
another architecture, took no part in any training: a Frechet distance in its features has no stake.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ptq_tdq.calib_data.reference import (
    Cifar10Classifier,
    ConvMixer,
    Statistics,
    load_classifier,
    load_second_classifier,
    reference_features,
    reference_statistics,
    second_statistics,
)
from ptq_tdq.evaluate.frechet import feature_statistics, frechet_distance
from ptq_tdq.evaluate.quality import accuracy, feature_distance, inception_score, kid, precision_recall

BATCH = 100


@dataclass(frozen=True)
class Classifiers:
    """Both embedded classifiers."""

    first: Cifar10Classifier
    second: ConvMixer


@dataclass(frozen=True, eq=False)
class Described:
    """What the classifiers say of N images: features [N, 256], logits [N, 10], the second's features [N, 256]."""

    features: Tensor
    logits: Tensor
    second: Tensor


def load_classifiers() -> Classifiers:
    """Both, as they ship."""
    return Classifiers(load_classifier(), load_second_classifier())


@torch.no_grad()
def describe(classifiers: Classifiers, images: Tensor) -> Described:
    """Features and logits of images [N, 3, 32, 32] in [-1, 1]."""
    features, second = (
        torch.cat([classifier.features(part) for part in images.split(BATCH)])
        for classifier in (classifiers.first, classifiers.second)
    )
    return Described(features, classifiers.first.head(features), second)


def against_data(found: Described, labels: Tensor | None, seed: int = 0) -> dict[str, float]:
    """Distances to the training images, and how often the classifier sees the class that was asked for, if any was."""
    real = torch.from_numpy(reference_features())
    precision, recall = precision_recall(real, found.features)
    seen = {} if labels is None else {"class_accuracy": accuracy(found.logits, labels)}
    return seen | {
        "fd_c10": frechet_distance(*_statistics(found.features), *reference_statistics()),
        "fd_c10_second": frechet_distance(*_statistics(found.second), *second_statistics()),
        "kid_c10": kid(real, found.features, seed),
        "is_c10": inception_score(found.logits, seed),
        "precision_c10": precision,
        "recall_c10": recall,
    }


def against_full_precision(full: Described, found: Described) -> dict[str, float]:
    """Distances to the full-precision samples from the same noise: of pairs, and of the two sets as a whole."""

    def between(a: Tensor, b: Tensor) -> float:
        return frechet_distance(*_statistics(a), *_statistics(b))

    return {
        "feature_distance_c10": feature_distance(full.features, found.features),
        "fd_c10_to_full_precision": between(full.features, found.features),
        "fd_c10_second_to_full_precision": between(full.second, found.second),
        "class_agreement": accuracy(found.logits, full.logits.argmax(1)),
    }


def _statistics(features: Tensor) -> Statistics:
    return feature_statistics(features.numpy())
