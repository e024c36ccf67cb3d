"""Fake quantization in one pass over memory, and the errors of intervals (``affine.c``), of tensors that C can take."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ptq_tdq.native.library import load_c

FEW = 1 << 14  # values
DTYPES = torch.float32, torch.bfloat16


class _Grid(ctypes.Structure):
    """``Grid`` of affine.c."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("groups", "each", "each_zero", "half")),
        *((name, ctypes.c_float) for name in ("qmin", "qmax")),
    ]


class _Search(ctypes.Structure):
    """``Search`` of affine.c."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("intervals", "groups", "each", "shared")),
        *((name, ctypes.c_float) for name in ("qmin", "qmax", "power")),
    ]


class Grid(NamedTuple):
    """``groups`` runs of memory with a scale of their own, in a tensor of these strides."""

    library: ctypes.CDLL
    strides: tuple[int, ...]
    groups: int
    bounds: tuple[int, int]

    def fake_quantize(self, x: Tensor, scale: Tensor, zero_point: Tensor, keep: bool) -> tuple[Tensor, Tensor | None]:
        """What :func:`ptq_tdq.affine.fake_quantize` gives for the tensors that :func:`grid_of` saw, and for the
        gradients x / scale, where that is to be kept.
        """
        y, kept = torch.empty_like(x), torch.empty_like(x, dtype=torch.float32) if keep else None
        given = x.data_ptr(), scale.data_ptr(), zero_point.data_ptr()
        places = y.data_ptr(), None if kept is None else kept.data_ptr()
        self.library.fake_quantize(self._grid(x, zero_point), *given, *places)
        return y, kept

    def gradients(self, kept: Tensor, scale: Tensor, zero_point: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of x and of the scale, for that of the result."""
        kept, grad, zero_point = self._laid(kept), self._laid(grad), zero_point.contiguous()
        of_x, of_scale = torch.empty_like(grad), torch.empty_like(scale)
        given = kept.data_ptr(), zero_point.data_ptr(), grad.data_ptr()
        places = of_x.data_ptr(), of_scale.data_ptr()
        if self.library.fake_quantize_gradients(self._grid(grad, zero_point), *given, *places):
            raise MemoryError
        return of_x, of_scale

    def _laid(self, x: Tensor) -> Tensor:
        """x as it lay in memory, whatever autograd and hooks made of it."""
        if x.stride() == self.strides and not x.is_neg():
            return x
        return torch.empty_strided(x.shape, self.strides, dtype=x.dtype).copy_(x)

    def _grid(self, x: Tensor, zero_point: Tensor) -> _Grid:
        each_zero, half = zero_point.numel() > 1, x.dtype == torch.bfloat16
        return _Grid(self.groups, x.numel() // self.groups, each_zero, half, *self.bounds)


def grid_of(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Grid | None:
    """The grid on which C quantizes x; None where torch has to.

    C takes dense float32 and bfloat16 of the CPU, in any order of dimensions, with one scale or one for each index of
    the outermost of them: of samples, tokens or output channels. What torch traces has to be torch's, and for few
    values it is quicker.
    """
    if _is_traced() or x.numel() < FEW or x.dtype not in DTYPES:
        return None
    if not scale.dtype == zero_point.dtype == torch.float32:
        return None
    if not all(map(_is_plain, (x, scale, zero_point))) or (library := _library()) is None:
        return None
    order = list(range(x.ndim))
    if not x.is_contiguous():
        order.sort(key=x.stride, reverse=True)
        if not x.permute(order).is_contiguous():
            return None
    if scale.numel() != 1 and not (scale.ndim == x.ndim and _are_outermost(scale.permute(order), x.permute(order))):
        return None
    alike = zero_point.shape == scale.shape and zero_point.stride() == scale.stride()
    if not (alike or zero_point.numel() == 1) or max(scale.ndim, zero_point.ndim) > x.ndim:
        return None
    return Grid(library, x.stride(), scale.numel(), (qmin, qmax))


def interval_errors(
    x: Tensor,
    counts: Tensor | None,
    size: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bounds: tuple[int, int],
    power: float,
) -> Tensor | None:
    """What :func:`ptq_tdq.search.interval_errors` gives; None where torch has to compute it."""
    given = [x, size, scale, zero_point, *([] if counts is None else [counts])]
    if _is_traced() or not all(_is_plain(tensor) and tensor.dtype == torch.float32 for tensor in given):
        return None
    if (library := _library()) is None:
        return None
    x, size, scale, zero_point = (tensor.contiguous() for tensor in (x, size, scale, zero_point))
    counts = None if counts is None else counts.contiguous()
    errors, shared = torch.empty_like(scale), x.ndim == 1
    places = x.data_ptr(), None if counts is None else counts.data_ptr(), size.data_ptr()
    search = _Search(*scale.shape, x.shape[-1], shared, *bounds, power)
    library.interval_errors(search, *places, scale.data_ptr(), zero_point.data_ptr(), errors.data_ptr())
    return errors


def _is_traced() -> bool:
    """Whether torch writes down what it computes, which C would be missing in."""
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None


def _is_plain(x: Tensor) -> bool:
    """Whether the values of x are the numbers at its address."""
    return type(x) in (Tensor, nn.Parameter) and x.is_cpu and not x.is_neg()


def _are_outermost(scale: Tensor, x: Tensor) -> bool:
    """Whether there is one scale for each index of the first dimensions of x."""
    inner = max((d for d, size in enumerate(scale.shape) if size != 1), default=-1)
    return scale.is_contiguous() and scale.shape[: inner + 1] == x.shape[: inner + 1]


@lru_cache
def _library() -> ctypes.CDLL | None:
    """The functions of affine.c, if they can be built."""
    library = load_c("ptq_tdq.native", "affine.c")
    if isinstance(library, str):
        return None
    pointers = [ctypes.c_void_p] * 5
    library.fake_quantize.argtypes = library.fake_quantize_gradients.argtypes = [_Grid, *pointers]
    library.interval_errors.argtypes = [_Search, *pointers, ctypes.c_void_p]
    library.interval_errors.restype = None
    library.fake_quantize.restype, library.fake_quantize_gradients.restype = None, ctypes.c_int
    return library
