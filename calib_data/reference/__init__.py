"""The embedded reference model: a small class-conditional latent diffusion model of CIFAR-10.

The folder holds ``unet/``, ``vae/`` and ``scheduler/`` as diffusers writes them (fp16 weights), two CIFAR-10
classifiers and the statistics of their features over the training images, to which FD-C10 is measured, with the first
one's features of 1,000 of these images for metrics that need single ones. ``README.md`` is the card.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file as load_arrays
from safetensors.torch import load_file
from torch import nn

from ptq_tdq.calib_data.reference.classifier import FEATURES, Cifar10Classifier
from ptq_tdq.calib_data.reference.convmixer import ConvMixer

__all__ = [
    "FEATURES",
    "NO_CLASS",
    "Cifar10Classifier",
    "ConvMixer",
    "load_classifier",
    "load_second_classifier",
    "reference_features",
    "reference_path",
    "reference_statistics",
    "second_statistics",
]

Statistics = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Mean [256] and covariance [256, 256]."""
Network = TypeVar("Network", bound=nn.Module)

NO_CLASS = 10
"""The class label that means "no class" (for classifier-free guidance); 0-9 are the CIFAR-10 classes in their order."""


def reference_path() -> Path:
    """Return the folder whose sub-folders diffusers reads.

    For example ``UNet2DModel.from_pretrained(reference_path(), subfolder="unet", torch_dtype=torch.float32)``.
    """
    return Path(__file__).parent


def load_classifier() -> Cifar10Classifier:
    """Load the classifier in evaluation mode, float32, without gradients."""
    return _loaded(Cifar10Classifier(), "classifier.safetensors")


def load_second_classifier() -> ConvMixer:
    """Load the classifier that took no part in any training, as :func:`load_classifier` does the first."""
    return _loaded(ConvMixer(), "second_classifier.safetensors")


def reference_statistics() -> Statistics:
    """Load the mean and the covariance of the first classifier's features of 50,000 training images."""
    return _statistics("cifar10_train_features.safetensors")


def second_statistics() -> Statistics:
    """Load the mean and the covariance of the second classifier's features of 50,000 training images."""
    return _statistics("second_cifar10_train_features.safetensors")


def _loaded(classifier: Network, name: str) -> Network:
    stored = load_file(reference_path() / name)
    classifier.load_state_dict({name: v.float() if v.is_floating_point() else v for name, v in stored.items()})
    return classifier.eval().requires_grad_(False)


def _statistics(name: str) -> Statistics:
    stored = load_arrays(reference_path() / name)
    return stored["mean"].astype(np.float64), stored["cov"].astype(np.float64)


def reference_features() -> NDArray[np.float32]:
    """Load the features float32 [1000, 256] (stored in float16) of 1,000 training images, 100 of each class in turn."""
    stored = load_arrays(reference_path() / "cifar10_train_sample.safetensors")
    return stored["features"].astype(np.float32)
