"""The time step t: the axis of the interval tables, and the clock that carries each sample's t to the quantizers.

t is the scheduler's training time, 0..T-1, integer or fractional (Euler, DPM-Solver). It comes from the model's own
``timestep`` argument and is the only key of a table: never a call counter or a position in a schedule.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ptq_tdq.errors import ModelError, TimestepError


def require_covered(t: Tensor, last: int) -> None:
    """Raise :class:`TimestepError` unless every ``t`` is in [0, last]."""
    inside = (t >= 0) & (t <= last)
    if not bool(inside.all()):
        raise TimestepError(
            f"The interval tables cover the time steps 0 to {last}. Got t = {t[~inside][0].item():g}; "
            "use a scheduler with the model's own number of training steps."
        )


def as_vector(t: Tensor | float | int) -> Tensor:
    """t of one or all samples as a vector; a float of Python's is float32, whatever torch's default dtype is.

    Raises :class:`ModelError` for anything but a number or a vector of them.
    """
    vector: Tensor = torch.atleast_1d(torch.as_tensor(t, dtype=torch.float32 if isinstance(t, float) else None))
    if vector.ndim > 1 or not len(vector):
        raise ModelError(f"The time step must be one number or one per sample. Got the shape {list(vector.shape)}.")
    return vector


def lookup(table: Tensor, t: Tensor) -> Tensor:
    """Values of ``table`` [T, ...] at ``t`` [B]: [B, ...], exact for integer t, linear between neighbours otherwise.

    Integer tables (zero points) are interpolated and rounded. Raises :class:`TimestepError` outside [0, T-1].
    """
    last = table.shape[0] - 1
    require_covered(t, last)
    below = t.floor().long()
    if t.dtype == torch.int64 or bool((below == t).all()):
        return table[below]
    fraction = (t - below).to(torch.float32).view(-1, *[1] * (table.ndim - 1))
    low, high = table[below], table[(below + 1).clamp(max=last)]
    value = low + (high - low) * fraction
    return value if table.is_floating_point() else value.round().to(table.dtype)


class Clock:
    """The time steps of the forward pass that runs now, one per sample; each quantized model owns one."""

    def __init__(self) -> None:
        self._t: Tensor | None = None

    def set(self, t: Tensor | float | int) -> None:
        """Set t: a scalar (all samples alike) or a tensor [B]."""
        self._t = as_vector(t)

    def read(self, batch: int) -> Tensor:
        """t of each of ``batch`` samples, [batch]; a batch that repeats each sample k times gets each t k times."""
        if self._t is None:
            raise ModelError(
                "A quantizer ran outside the quantized model's forward pass; call the model, not its parts."
            )
        if batch % self._t.numel():
            raise ModelError(
                f"{self._t.numel()} time steps do not fit a batch of {batch}; pass one t, or one per sample."
            )
        return self._t.repeat_interleave(batch // self._t.numel())
