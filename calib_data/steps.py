"""Which steps of a sampling run go into the calibration set."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from ptq_tdq.errors import ConfigError

StepDistribution = Literal["uniform", "normal"]

# PTQ4DM (arXiv 2211.15736) asks for a mean below T/2 and in its published runs takes 0.4 T for mean and deviation.
NORMAL_MEAN, NORMAL_STD = 0.4, 0.4


def choose_steps(
    timesteps: Tensor,
    count: int,
    distribution: StepDistribution = "uniform",
    generator: torch.Generator | None = None,
    *,
    num_train_timesteps: int = 1000,
) -> list[int]:
    """Choose ``count`` different step indices of one trajectory, in sampling order.

    ``timesteps`` [S] are the sampler's time steps t in [0, T], in sampling order; the result indexes them.

    ``uniform``: evenly spaced over the sampling order, first and last step included (Q-Diffusion).
    ``normal``: drawn without replacement, with weights from N(0.4 T, (0.4 T)^2) at each t, so that steps near t = 0,
    where the image takes shape, come up more often (PTQ4DM section 3.3). Where PTQ4DM draws t from the whole line and
    clamps it, this draws among the sampler's own steps, so that nothing piles up at t = 0.

    Raises :class:`ConfigError` for an unknown distribution or a count outside 1..S.
    """
    known = get_args(StepDistribution)
    if distribution not in known:
        raise ConfigError(f"The step distribution must be one of {', '.join(known)}. Got {distribution!r} instead.")
    total = len(timesteps)
    if not 1 <= count <= total:
        raise ConfigError(
            f"The number of calibration steps must be between 1 and {total}, the steps of the sampler. "
            f"Got {count} instead."
        )
    if distribution == "uniform":
        gaps = max(count - 1, 1)
        return [(2 * i * (total - 1) + gaps) // (2 * gaps) for i in range(count)]  # rounded to the nearest step
    z = (timesteps.double().cpu() / num_train_timesteps - NORMAL_MEAN) / NORMAL_STD
    drawn = torch.multinomial(torch.exp(-0.5 * z**2), count, replacement=False, generator=generator)
    return sorted(drawn.tolist())
