"""Store the classifier's features of 1,000 CIFAR-10 training images, the real side of KID-C10, precision and recall.

``--data`` is what ``train_reference.py`` takes. The images are a random choice with a seed, 100 of each class.
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
import torch
from reference_model.data import load_images, to_unit
from safetensors.numpy import save

from ptq_tdq.artifacts import write_atomic
from ptq_tdq.calib_data.reference import load_classifier, reference_path
from ptq_tdq.evaluate.c10 import describe
from ptq_tdq.evaluate.quality import accuracy


@click.command()
@click.option("--data", type=click.Path(path_type=Path), required=True)
@click.option("--per-class", default=100, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(data: Path, per_class: int, seed: int) -> None:
    images, labels = load_images(data)
    generator = np.random.default_rng(seed)
    chosen = np.stack([generator.permutation(np.flatnonzero(labels.numpy() == c))[:per_class] for c in range(10)], 1)
    found = describe(load_classifier(), to_unit(images[torch.from_numpy(chosen.flatten())]))
    path = reference_path() / "cifar10_train_sample.safetensors"
    write_atomic(path, save({"features": found.features.numpy().astype(np.float16)}))
    seen = accuracy(found.logits, torch.arange(10).repeat(per_class))
    print(f"{len(found.features)} rows, accuracy {seen:.3f}")


if __name__ == "__main__":
    main()
