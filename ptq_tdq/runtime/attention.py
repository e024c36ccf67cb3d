"""The two products of attention on integer codes.

    softmax(q k^T factor + mask) v      with quantizers on q, k, v and the softmax output (method section 3.8)

``native.c`` adds them in 32 bits; the reference in float32, which holds sums below 2^24 exactly: torch has no batched
int8 product.
Layout as in torch: q [B, heads, N, d], k [B, heads, M, d], v [B, heads, M, e].
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ptq_tdq.modules.products import lying_as
from ptq_tdq.native.address import address, untraced
from ptq_tdq.records import LayerRecord
from ptq_tdq.runtime.kernels import levels
from ptq_tdq.runtime.step import Interval, Step
from ptq_tdq.scheme import QType

FindInterval = Callable[[int, Tensor], Interval]  # number of the quantizer (q, k, v, softmax), its tokens [B, ..., K]
Attend = Callable[[Tensor, Tensor, Tensor, FindInterval, Sequence[int], float, Tensor | None], Tensor]
"""q, k, v, intervals, the four quantizers' bits, factor, what is added to the scores -> [B, heads, N, e].

k and v may have fewer heads, each for several of q; the mask is float32 and broadcasts to [B, heads, N, M].
"""


def reference_attend(
    q: Tensor, k: Tensor, v: Tensor, find: FindInterval, bits: Sequence[int], factor: float, mask: Tensor | None
) -> Tensor:
    """:data:`Attend` in torch operations; for dynamic quantizers too, and for any leading dimensions."""

    def coded(index: int, x: Tensor) -> tuple[Tensor, Tensor]:
        return levels(x, *find(index, x), bits[index])

    (q, s_q), (k, s_k), (v, s_v) = (coded(i, x) for i, x in enumerate((q, k, v.transpose(-1, -2))))
    if q.ndim > 2 and k.shape[-3] not in (1, q.shape[-3]):
        repeat = q.shape[-3] // k.shape[-3]
        k, v, s_k, s_v = (x.repeat_interleave(repeat, -3) if x.shape[-3] > 1 else x for x in (k, v, s_k, s_v))
    k, s_k, v, s_v = (x.transpose(-1, -2) for x in (k, s_k, v, s_v))
    scores = q @ k * (s_q * s_k * factor)
    # a row that may look at nothing gives zeros, as torch's own function does
    probabilities = scores.softmax(-1) if mask is None else (scores + mask).softmax(-1).nan_to_num_(0.0)
    probabilities, s_p = coded(3, probabilities)
    return probabilities @ v * (s_p * s_v)


class AttentionSizes(ctypes.Structure):
    """``Attention`` of native.c."""

    _sizes_ = ("batch", "queries", "keys", "heads", "key_heads", "depth", "value_depth", "each")
    _steps_ = ("mask_batch", "mask_head", "mask_row")
    _fields_ = [
        *((name, ctypes.c_int64) for name in (*_sizes_, *_steps_)),
        ("factor", ctypes.c_float),
        ("qmax", ctypes.c_float * 4),
    ]


def tops(bits: Sequence[int]) -> ctypes.Array[ctypes.c_float]:
    """The top codes of the four quantizers."""
    return (ctypes.c_float * 4)(*(float(QType(b).qmax) for b in bits))


def native_attend(library: ctypes.CDLL) -> Attend:
    """:data:`Attend` of ``native.c``, for quantizers with tables and four dimensions."""
    function = library.attention
    function.argtypes, function.restype = [ctypes.c_void_p] * 8, ctypes.c_int

    @untraced
    def attend(
        q: Tensor, k: Tensor, v: Tensor, find: FindInterval, bits: Sequence[int], factor: float, mask: Tensor | None
    ) -> Tensor:
        q, k, v = (x.transpose(1, 2).float().contiguous() for x in (q, k, v))  # as most models have them in memory
        found = [find(index, x) for index, x in enumerate((q, k, v, q))]  # tables do not look at x
        scale = torch.cat([interval.scale for interval in found])
        zero_point = torch.cat([interval.zero_point for interval in found])
        each = found[0].each
        (batch, queries, heads, depth), (_, keys, key_heads, _), values = q.shape, k.shape, v.shape[-1]
        intervals = (len(found) * (batch if each else 1),)
        mask, steps = steps_of(mask, (batch, heads, queries, keys))
        out = torch.empty((batch, queries, heads, values), dtype=torch.float32)
        sizes = batch, queries, keys, heads, key_heads, depth, values, int(each)
        call = AttentionSizes(*sizes, *steps, factor, tops(bits))
        if function(
            ctypes.addressof(call),
            address("q", q, torch.float32, (batch, queries, heads, depth)),
            address("k", k, torch.float32, (batch, keys, key_heads, depth)),
            address("v", v, torch.float32, (batch, keys, key_heads, values)),
            None if mask is None else address("a mask", mask, torch.float32, mask.shape),
            address("the scales of an attention", scale, torch.float32, intervals),
            address("the zero points of an attention", zero_point, torch.int32, intervals),
            out.data_ptr(),
        ):
            raise MemoryError
        return out.transpose(1, 2)

    return attend


def covers(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the native form takes tensors of these shapes."""
    return (
        q.ndim == k.ndim == v.ndim == 4
        and len(q) == len(k) == len(v)
        and k.shape[1:3] == v.shape[1:3]
        and q.shape[-1] == k.shape[-1]
        and q.shape[1] % max(1, k.shape[1]) == 0
        and min(q.numel(), k.numel(), v.numel()) > 0
    )


def steps_of(mask: Tensor | None, scores: tuple[int, int, int, int]) -> tuple[Tensor | None, tuple[int, int, int]]:
    """A mask with whole rows of keys in memory, and its steps from sample to sample, head to head, row to row."""
    if mask is None:
        return None, (0, 0, 0)
    mask = mask[(None,) * (4 - mask.ndim)]
    mask = mask.float().expand(*mask.shape[:3], scores[-1]).contiguous()
    mask.expand(scores)  # raises for a mask that does not fit
    steps = [0 if size == 1 else step for size, step in zip(mask.shape, mask.stride(), strict=True)]
    return mask, (steps[0], steps[1], steps[2])


class IntegerProduct(nn.Module):
    """A product of attention on codes, in the place of ``torch.nn.functional.scaled_dot_product_attention``."""

    def __init__(self, record: LayerRecord, step: Step, attend: Attend) -> None:
        super().__init__()
        self.record, self.step = record, step
        self.timed = all(quantizer.name in step for quantizer in record.inputs)
        self.bits = [quantizer.bits for quantizer in record.inputs]
        self.native = attend

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """As torch's function, in float32; dropout is for training and none is done."""
        factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
        mask = None if attn_mask is None else added(attn_mask)
        if is_causal:
            causal = torch.full((query.shape[-2], key.shape[-2]), -torch.inf).triu_(1)
            mask = causal if mask is None else mask + causal
        return self.attend(query, key, value, factor, mask)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, factor: float, mask: Tensor | None = None) -> Tensor:
        """The product by the fastest form that covers it."""
        attend = self.native if self.timed and covers(q, k, v) else reference_attend
        return lying_as(q, attend(q, k, v, self._interval, self.bits, factor, mask))

    def _interval(self, index: int, x: Tensor) -> Interval:
        return self.step.interval(self.record.inputs[index].name, x)


def added(mask: Tensor) -> Tensor:
    """A mask of booleans (True: look there) as what is added to the scores."""
    if mask.dtype != torch.bool:
        return mask.float()
    return torch.zeros(mask.shape).masked_fill_(~mask, -torch.inf)
