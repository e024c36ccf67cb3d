"""Sample quality in the features of the embedded CIFAR-10 classifier; each number is called -C10, never by Inception's.

The real side of FD-C10 are the statistics of the 50,000 training images, that of KID-C10, precision and recall the
stored features of 1,000 of them (100 of each class). The decoder that both embedded models share was trained in feature
maps of this classifier: these numbers compare quantizations of an embedded model and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ptq_tdq.calib_data.reference import Cifar10Classifier, reference_features, reference_statistics
from ptq_tdq.evaluate.frechet import feature_statistics, frechet_distance
from ptq_tdq.evaluate.quality import accuracy, feature_distance, inception_score, kid, precision_recall

BATCH = 100


@dataclass(frozen=True, eq=False)
class Described:
    """What the classifier says of N images: features [N, 256] and logits [N, 10]."""

    features: Tensor
    logits: Tensor


@torch.no_grad()
def describe(classifier: Cifar10Classifier, images: Tensor) -> Described:
    """Features and logits of images [N, 3, 32, 32] in [-1, 1]."""
    features = torch.cat([classifier.features(part) for part in images.split(BATCH)])
    return Described(features, classifier.head(features))


def against_data(found: Described, labels: Tensor, seed: int = 0) -> dict[str, float]:
    """Distances to the training images, and how often the classifier sees the class that was asked for."""
    real = torch.from_numpy(reference_features())
    precision, recall = precision_recall(real, found.features)
    return {
        "fd_c10": frechet_distance(*feature_statistics(found.features.numpy()), *reference_statistics()),
        "kid_c10": kid(real, found.features, seed),
        "is_c10": inception_score(found.logits, seed),
        "precision_c10": precision,
        "recall_c10": recall,
        "class_accuracy": accuracy(found.logits, labels),
    }


def against_full_precision(full: Described, found: Described) -> dict[str, float]:
    """Distances to the full-precision samples from the same noise: of pairs, and of the two sets as a whole."""
    statistics = (feature_statistics(each.features.numpy()) for each in (full, found))
    (mean, cov), mine = statistics
    return {
        "feature_distance_c10": feature_distance(full.features, found.features),
        "fd_c10_to_full_precision": frechet_distance(mean, cov, *mine),
        "class_agreement": accuracy(found.logits, full.logits.argmax(1)),
    }
