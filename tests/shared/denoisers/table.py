"""What one row of the table of denoisers says: how to build a small one, and what its own pipeline calls it with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

Arguments = dict[str, Any]

# Parameters that diffusers leaves to a checkpoint: their memory is not even initialised.
UNSET = (".gate_up_proj", ".down_proj", "pad_token")


class Rows:
    """Random arguments of the batch rows ``first``, ``first + 1``, ...: a row's values follow from its number alone."""

    def __init__(self, batch: int, first: int) -> None:
        self.numbers = range(first, first + batch)
        self.generators = [torch.Generator().manual_seed(number) for number in self.numbers]

    def __len__(self) -> int:
        return len(self.numbers)

    def __call__(self, *shape: int) -> Tensor:
        """Standard normal, shape ``[batch, *shape]``."""
        return torch.stack([torch.randn(shape, generator=generator) for generator in self.generators])

    def integers(self, high: int, *shape: int) -> Tensor:
        """Uniform below ``high``, shape ``[batch, *shape]``."""
        return torch.stack([torch.randint(high, shape, generator=generator) for generator in self.generators])

    def lengths(self, longest: int) -> list[int]:
        """Tokens of each row's prompt: the longest in even rows, one less in odd rows."""
        return [longest - number % 2 for number in self.numbers]

    def mask(self, longest: int) -> Tensor:
        """True where a prompt has a token, shape ``[batch, longest]``."""
        return torch.arange(longest) < torch.tensor(self.lengths(longest))[:, None]


@dataclass(frozen=True)
class Denoiser:
    """
    A class of diffusers, a configuration that makes it small, and the arguments that its pipeline calls it with.

    The pipeline's time argument is ``time_scale * t``, or ``time_scale * (1000 - t)`` where ``reversed``.
    """

    name: str  # the class, then what tells two entries of one class apart
    config: Mapping[str, Any]
    arguments: Callable[[Rows], Arguments]  # all but the time
    time_argument: str = "timestep"
    more_times: tuple[str, ...] = ()  # arguments that get the same time again
    time_scale: float = 1.0
    reversed: bool = False
    time_repeats: int = 0  # the time is [batch, repeats] where the pipeline repeats it for each frame
    return_dict: bool | None = False  # None: the pipeline leaves it out
    mixes_rows: bool = False

    def build(self) -> nn.Module:
        """The same weights each time, in which every block counts; eval mode; float32."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = getattr(diffusers, self.name.split()[0])(**self.config)
            _disturb_constants(model)
        return model.eval().requires_grad_(False)

    def inputs(self, batch: int, t: Tensor, first: int = 0) -> Arguments:
        """Keyword arguments of one call for the rows from ``first``; ``t`` ``[batch]`` on the scheduler's 0..1000."""
        time = self.time_scale * (1000 - t if self.reversed else t)
        if self.time_repeats:
            time = time[:, None].repeat(1, self.time_repeats)
        arguments = self.arguments(Rows(batch, first))
        arguments |= dict.fromkeys((self.time_argument, *self.more_times), time)
        return arguments if self.return_dict is None else arguments | {"return_dict": self.return_dict}


def prediction(output: Any) -> Tensor:
    """The denoiser's output as one tensor ``[batch, ...]``: the first of several, a list of rows stacked."""
    if isinstance(output, Tensor):
        return output
    return torch.stack(output[0]) if isinstance(output[0], list) else output[0]


def _disturb_constants(model: nn.Module) -> None:
    """Add noise to constant parameters: behind a gate or an output layer of zeros, no block would count."""
    for name, parameter in model.named_parameters():
        if name.endswith(UNSET):
            nn.init.normal_(parameter, std=0.1)
        elif bool((parameter == parameter.flatten()[0]).all()):
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
            nn.init.normal_(noise := torch.empty_like(parameter), std=0.5 / max(fan_in, 25) ** 0.5)
            parameter.data += noise
