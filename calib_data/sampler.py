"""How a model samples: by its own pipeline, or by the plain loop over its scheduler's steps."""

from __future__ import annotations

import copy
import hashlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ptq_tdq.errors import ConfigError


@dataclass(frozen=True)
class Sampled:
    """What one run gives, float32 on the CPU.

    ``latents`` [B, ...] is the end of the way, before any decoder. ``images`` [B, 1 or 3, H, W] in [-1, 1], of a video
    its first frame, is None for sounds and for latents that nothing turns into images.
    """

    latents: Tensor
    images: Tensor | None


class Sampler(ABC):
    """Samples with a denoiser; everything but the denoiser itself belongs to it.

    ``batch`` is how many samples run at once unless somebody asks for another number; ``num_classes`` is 0 for a model
    without classes, ``classes`` are those to sample, by default all.
    """

    scheduler: Any
    batch: int
    num_classes: int = 0
    classes: list[int] | None = None

    @property
    def num_conditions(self) -> int:
        """How many conditions there are to show, at least 1."""
        return max(1, self.num_classes) if self.classes is None else len(self.classes)

    def choose(self, classes: Sequence[int] | None) -> None:
        """Sample these classes (None: all); raises :class:`ConfigError` for those that the model does not have."""
        wrong = [c for c in classes or () if not 0 <= c < self.num_classes]
        if classes is not None and not self.num_classes:
            raise ConfigError("The model takes no classes; leave classes out.")
        if wrong or (classes is not None and not classes):
            raise ConfigError(
                f"The classes must be numbers from 0 to {self.num_classes - 1}. Got {wrong[0] if wrong else 'none'}."
            )
        self.classes = None if classes is None else list(classes)

    def conditions(self, count: int) -> list[Any]:
        """What the samples 0 to ``count`` - 1 are to show: class numbers, prompts, or None."""
        if self.classes is not None:
            return [self.classes[i % len(self.classes)] for i in range(count)]
        return list(spread_classes(count, self.num_classes)) if self.num_classes else [None] * count

    @abstractmethod
    def run(
        self,
        denoiser: nn.Module,
        conditions: Sequence[Any],
        generators: Sequence[torch.Generator],
        num_inference_steps: int,
        schedule: Any,
    ) -> Sampled:
        """Sample once for each condition; all noise of a sample comes from its generator.

        ``schedule`` is a copy of the scheduler that the run may set and use up (:func:`new_schedule`).
        """

    @abstractmethod
    def recipe(self) -> dict[str, Any]:
        """All that the samples depend on beside the denoiser, the scheduler and the noise, as plain JSON values."""


def new_schedule(sampler: Sampler) -> Any:
    """A copy of the sampler's scheduler for one run; the original keeps its state."""
    return copy.deepcopy(sampler.scheduler)


def sample_generator(purpose: str, seed: int, sample: int) -> torch.Generator:
    """The noise of one sample; other purposes, seeds and samples share nothing with it."""
    digest = hashlib.sha256(f"{purpose} {seed} {sample}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def spread_classes(count: int, num_classes: int) -> list[int]:
    """Classes of ``count`` samples, evenly drawn: all in turn, or, where there are more, every so many."""
    if not count:
        return []
    return [i % num_classes if count >= num_classes else i * num_classes // count for i in range(count)]


def takes(function: Any, name: str) -> bool:
    """Whether ``function`` has a parameter of this name."""
    return name in inspect.signature(function).parameters
