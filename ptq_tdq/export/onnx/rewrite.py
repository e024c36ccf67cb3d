"""Functions of torch that its exporter writes wrongly, said in other words while a model is traced."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


def repeat_interleave(x: Tensor, repeats: Any, dim: int | None = None, *, output_size: Any = None) -> Tensor:
    """As ``torch.repeat_interleave``, whose exporter puts a number of repeats that may vary on the wrong axis."""
    if isinstance(repeats, Tensor):
        return torch.repeat_interleave(x, repeats, dim, output_size=output_size)
    x, axis = (x.flatten(), 0) if dim is None else (x, dim % x.ndim)
    return x.unsqueeze(axis + 1).expand(*x.shape[: axis + 1], repeats, *x.shape[axis + 1 :]).flatten(axis, axis + 1)


_WORDS = {torch.repeat_interleave: repeat_interleave, Tensor.repeat_interleave: repeat_interleave}


class InOtherWords(TorchFunctionMode):
    """Calls the functions of this module in the place of torch's own."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _WORDS.get(func, func)(*args, **(kwargs or {}))
