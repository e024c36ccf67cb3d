"""The embedded reference model: a small class-conditional latent diffusion model of CIFAR-10.

The folder holds ``unet/``, ``vae/`` and ``scheduler/`` as diffusers writes them (fp16 weights), a CIFAR-10 classifier
and the statistics of its features over the training images, to which FD-C10 is measured, with the features of 1,000 of
these images for metrics that need single ones. ``README.md`` is the card.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file as load_arrays
from safetensors.torch import load_file

from ptq_tdq.calib_data.reference.classifier import FEATURES, Cifar10Classifier
from ptq_tdq.calib_data.reference.convmixer import ConvMixer

__all__ = [
    "FEATURES",
    "NO_CLASS",
    "Cifar10Classifier",
    "ConvMixer",
    "load_classifier",
    "reference_features",
    "reference_path",
    "reference_statistics",
]

NO_CLASS = 10
"""The class label that means "no class" (for classifier-free guidance); 0-9 are the CIFAR-10 classes in their order."""


def reference_path() -> Path:
    """Return the folder whose sub-folders diffusers reads.

    For example ``UNet2DModel.from_pretrained(reference_path(), subfolder="unet", torch_dtype=torch.float32)``.
    """
    return Path(__file__).parent


def load_classifier() -> Cifar10Classifier:
    """Load the classifier in evaluation mode, float32, without gradients."""
    classifier = Cifar10Classifier()
    stored = load_file(reference_path() / "classifier.safetensors")
    classifier.load_state_dict({name: value.to(torch.float32) for name, value in stored.items()})
    return classifier.eval().requires_grad_(False)


def reference_statistics() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Load the mean float64 [256] and the covariance float64 [256, 256] of the features of 50,000 training images."""
    stored = load_arrays(reference_path() / "cifar10_train_features.safetensors")
    return stored["mean"].astype(np.float64), stored["cov"].astype(np.float64)


def reference_features() -> NDArray[np.float32]:
    """Load the features float32 [1000, 256] (stored in float16) of 1,000 training images, 100 of each class in turn."""
    stored = load_arrays(reference_path() / "cifar10_train_sample.safetensors")
    return stored["features"].astype(np.float32)
