"""What a denoiser gives: a tensor, or a tuple, list, dict or dataclass with one in it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from ptq_tdq.errors import CalibrationSetError


def tensors_of(output: Any) -> list[Tensor]:
    """All tensors of a denoiser's output, in its order."""
    return [output] if isinstance(output, Tensor) else [x for inner in _inside(output) for x in tensors_of(inner)]


def prediction(output: Any) -> Tensor:
    """What a denoiser predicts: the first tensor of its output, or its list with one tensor per row, stacked.

    A number (a loss beside it) has no rows and is none. A list of several shapes, such as a ControlNet's, comes as one
    tensor [B, values], complex numbers as pairs of real ones [..., 2]. Raises :class:`CalibrationSetError` for an
    output without a tensor, and for such a list without a common B.
    """
    found = _first(output)
    if isinstance(found, Tensor):
        return found
    if all(x.shape == found[0].shape for x in found):
        return torch.stack(found)
    if len({x.shape[:1] for x in found}) > 1:
        shapes = " and ".join(str(list(x.shape)) for x in found[:2])
        raise CalibrationSetError(f"The model gives tensors of different shapes ({shapes}); call it with like samples.")
    return torch.cat([x.flatten(1) for x in found], 1)


def last_row(output: Any) -> Tensor:
    """The last row of :func:`prediction`, where rows may differ in size."""
    return _first(output)[-1]


def _first(output: Any) -> Tensor | list[Tensor]:
    """The first tensor of a denoiser's output, or its first list with one tensor per row, whose sizes may differ."""
    found = next(_candidates(output), None)
    if found is None:
        raise CalibrationSetError(
            f"The model gives a {type(output).__name__} without a tensor, which is no prediction; record a denoiser."
        )
    return found


def _candidates(output: Any) -> Iterator[Tensor | list[Tensor]]:
    if _has_rows(output) or (isinstance(output, list) and output and all(map(_has_rows, output))):
        yield _real(output) if isinstance(output, Tensor) else [*map(_real, output)]
    else:
        for inner in _inside(output):
            yield from _candidates(inner)


def _real(x: Tensor) -> Tensor:
    return torch.view_as_real(x) if x.is_complex() else x


def _has_rows(output: Any) -> bool:
    return isinstance(output, Tensor) and output.ndim > 0


def _inside(output: Any) -> Iterable[Any]:
    """What an output holds."""
    if isinstance(output, dict):
        return output.values()
    if isinstance(output, list | tuple):
        return output
    return [getattr(output, f.name) for f in fields(output)] if is_dataclass(output) else ()
