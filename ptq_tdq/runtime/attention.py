"""The two products of attention on integer codes, in floating point that represents their sums exactly.

    softmax(q k^T factor) v      with quantizers on q, k, v and the softmax output (method section 3.8)

Codes and their sums are integers below 2^24, which float32 holds exactly; torch has no batched int8 product.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ptq_tdq.runtime.address import address
from ptq_tdq.runtime.step import Interval
from ptq_tdq.scheme import QType

FindInterval = Callable[[int, Tensor], Interval]  # number of the quantizer (q, k, v, softmax), its tensor
Attend = Callable[[Tensor, Tensor, Tensor, FindInterval, Sequence[int], float], Tensor]
"""q, k, v [B, N, heads, d], intervals, the four quantizers' bits, factor -> [B, N, heads, d]."""


def reference_attend(q: Tensor, k: Tensor, v: Tensor, find: FindInterval, bits: Sequence[int], factor: float) -> Tensor:
    """:data:`Attend` in torch operations; for dynamic quantizers too."""

    def levels(index: int, x: Tensor) -> tuple[Tensor, Tensor]:
        return _levels(x, find(index, x), bits[index])

    (q, s_q), (k, s_k), (v, s_v) = (levels(i, x.transpose(1, 2)) for i, x in enumerate((q, k, v)))
    probabilities, s_p = levels(3, (q @ k.transpose(-1, -2) * (s_q * s_k * factor)).softmax(-1))
    return (probabilities @ v * (s_p * s_v)).transpose(1, 2)


def _levels(x: Tensor, interval: Interval, bits: int) -> tuple[Tensor, Tensor]:
    """Codes less their zero point as float32, and the scale [1 or B, 1, 1, 1]."""
    scale, zero_point = (value.view(-1, 1, 1, 1) for value in (interval.scale, interval.zero_point))
    return torch.clamp((x / scale).round_(), -zero_point, QType(bits).qmax - zero_point), scale


class _Attention(ctypes.Structure):
    """``Attention`` of native.c."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "tokens", "heads", "depth", "each")),
        ("factor", ctypes.c_float),
        ("qmax", ctypes.c_float * 4),
    ]


def native_attend(library: ctypes.CDLL) -> Attend:
    """:data:`Attend` of ``native.c``, for quantizers with tables."""
    function = library.attention
    function.argtypes, function.restype = [ctypes.c_void_p] * 7, ctypes.c_int

    def attend(q: Tensor, k: Tensor, v: Tensor, find: FindInterval, bits: Sequence[int], factor: float) -> Tensor:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        found = [find(index, x) for index, x in enumerate((q, k, v, q))]  # tables do not look at x
        scale = torch.cat([interval.scale for interval in found])
        zero_point = torch.cat([interval.zero_point for interval in found])
        each, shape = found[0].each, q.shape
        batch, tokens, heads, depth = shape
        intervals = (len(found) * (batch if each else 1),)
        out = torch.empty(shape, dtype=torch.float32)
        tops = (ctypes.c_float * 4)(*(float(QType(b).qmax) for b in bits))
        call = _Attention(batch, tokens, heads, depth, int(each), factor, tops)
        if function(
            ctypes.addressof(call),
            *(address(what, x, torch.float32, shape) for what, x in (("q", q), ("k", k), ("v", v))),
            address("the scales of an attention", scale, torch.float32, intervals),
            address("the zero points of an attention", zero_point, torch.int32, intervals),
            out.data_ptr(),
        ):
            raise MemoryError
        return out

    return attend
