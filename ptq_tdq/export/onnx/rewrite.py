"""Functions of torch that its exporter writes wrongly, said in other words while a model is traced."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree


def repeat_interleave(x: Tensor, repeats: Any, dim: int | None = None, *, output_size: Any = None) -> Tensor:
    """As ``torch.repeat_interleave``, whose exporter puts a number of repeats that may vary on the wrong axis."""
    if isinstance(repeats, Tensor):
        return torch.repeat_interleave(x, repeats, dim, output_size=output_size)
    x, axis = (x.flatten(), 0) if dim is None else (x, dim % x.ndim)
    return x.unsqueeze(axis + 1).expand(*x.shape[: axis + 1], repeats, *x.shape[axis + 1 :]).flatten(axis, axis + 1)


_WORDS = {torch.repeat_interleave: repeat_interleave, Tensor.repeat_interleave: repeat_interleave}
# These give the values of a tensor to Python, or as many values as they say.
_READS = {
    **{getattr(Tensor, name): name for name in ("__bool__", "__float__", "__index__", "__int__", "item", "numpy")},
    **{getattr(Tensor, name): name for name in ("bincount", "masked_select", "nonzero", "tolist", "unique")},
    **{getattr(torch, name): name for name in ("bincount", "masked_select", "nonzero", "unique")},
}


class InOtherWords(TorchFunctionMode):
    """Calls the functions of this module in the place of torch's own; ``reads`` names those that read values."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READS:
            self.reads.add(_READS[func].strip("_"))
        elif func is Tensor.__getitem__ and any(_is_mask(index) for index in pytree.tree_leaves(args[1])):
            self.reads.add("mask as an index")
        return _WORDS.get(func, func)(*args, **(kwargs or {}))


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype == torch.bool
