"""Store the classifiers' features of the CIFAR-10 training images, the real side of the -C10 metrics.

``--data`` is what ``train_reference.py`` takes. Of the first classifier: its features of a random 1,000 images, 100 of
each class in turn, for KID-C10, precision and recall (its mean and covariance came with the model). Of the second: mean
and covariance over all images.
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
import torch
from reference_model.data import load_images, to_unit
from safetensors.numpy import save

from ptq_tdq.atomic import write_atomic
from ptq_tdq.calib_data.reference import load_classifier, load_second_classifier, reference_path
from ptq_tdq.evaluate.frechet import feature_statistics
from ptq_tdq.evaluate.quality import accuracy


@click.command()
@click.option("--data", type=click.Path(path_type=Path), required=True)
@click.option("--per-class", default=100, show_default=True)
@click.option("--seed", default=0, show_default=True)
@torch.no_grad()
def main(data: Path, per_class: int, seed: int) -> None:
    images, labels = load_images(data)
    generator = np.random.default_rng(seed)
    chosen = np.stack([generator.permutation(np.flatnonzero(labels.numpy() == c))[:per_class] for c in range(10)], 1)
    first = load_classifier()
    sample = first.features(to_unit(images[torch.from_numpy(chosen.flatten())]))
    path = reference_path() / "cifar10_train_sample.safetensors"
    write_atomic(path, save({"features": sample.numpy().astype(np.float16)}))
    seen = accuracy(first.head(sample), torch.arange(10).repeat(per_class))
    print(f"{len(sample)} rows, accuracy {seen:.3f}")

    second = load_second_classifier()
    mean, cov = feature_statistics(torch.cat([second.features(to_unit(part)) for part in images.split(250)]).numpy())
    path = reference_path() / "second_cifar10_train_features.safetensors"
    write_atomic(path, save({"mean": mean.astype(np.float32), "cov": cov.astype(np.float32)}))
    print(f"second classifier: {len(images)} images")


if __name__ == "__main__":
    main()
