"""The door from the tensors of layers to C: an address is given only for memory that is what a kernel takes it for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from ptq_tdq.errors import RuntimeUnsupportedError

P = ParamSpec("P")
R = TypeVar("R")


def untraced(function: Callable[P, R]) -> Callable[P, R]:
    """The function, which torch.compile leaves as it is written, inside a compiled model too.

    Where it gives addresses to C, their tensors live until C has returned; torch.compile would let go of a tensor whose
    address is all that is left.
    """
    plain: Callable[P, R] = torch.compiler.disable(function)
    return plain


def address(
    what: str, x: Tensor, dtype: torch.dtype, shape: Sequence[int], layout: torch.memory_format | None = None
) -> int:
    """The address of ``x``; ``layout`` is torch.channels_last for images, else rows as they are written.

    Raises :class:`RuntimeUnsupportedError` for a tensor of another dtype, shape, layout or device.
    """
    whole = x.is_contiguous() if layout is None else x.is_contiguous(memory_format=layout)
    if not (whole and x.dtype == dtype and x.shape == tuple(shape) and x.is_cpu):
        raise RuntimeUnsupportedError(
            f"The integer kernels take {what} as {dtype} {list(shape)} without gaps on the CPU. "
            f"Got {x.dtype} {list(x.shape)} on {x.device} instead."
        )
    return x.data_ptr()


def per_sample(what: str, scale: Tensor, zero_point: Tensor, batch: int) -> tuple[int, int, bool]:
    """The addresses of an interval's scale and zero point, and whether each of ``batch`` samples has its own."""
    each = scale.numel() > 1
    shape = (batch if each else 1,)
    return (
        address(f"the scale of {what}", scale, torch.float32, shape),
        address(f"the zero point of {what}", zero_point, torch.int32, shape),
        each,
    )
