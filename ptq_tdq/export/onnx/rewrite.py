"""Functions of torch that its exporter writes wrongly, said in other words while a model is traced."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import Lock, get_ident
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ptq_tdq.export.onnx.reads import Answers, what_is_read


def repeat_interleave(x: Tensor, repeats: Any, dim: int | None = None, *, output_size: Any = None) -> Tensor:
    """As ``torch.repeat_interleave``, whose exporter puts a number of repeats that may vary on the wrong axis."""
    if isinstance(repeats, Tensor):
        return torch.repeat_interleave(x, repeats, dim, output_size=output_size)
    x, axis = (x.flatten(), 0) if dim is None else (x, dim % x.ndim)
    return x.unsqueeze(axis + 1).expand(*x.shape[: axis + 1], repeats, *x.shape[axis + 1 :]).flatten(axis, axis + 1)


def pad(x: Tensor, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Tensor:
    """As ``functional.pad``, whose circular mode becomes one that not all runtimes have: the ends are put together."""
    if mode != "circular" or min(pad) < 0:
        return functional.pad(x, pad, mode, value)
    for number, (before, after) in enumerate(zip(pad[::2], pad[1::2], strict=True), 1):
        axis = x.ndim - number  # the last one comes first
        x = torch.cat([x.narrow(axis, x.shape[axis] - before, before), x, x.narrow(axis, 0, after)], axis)
    return x


def copy_(x: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """As ``Tensor.copy_``, whose exporter takes the source for one of the same shape."""
    return x.copy_(source.expand(x.shape) if source.shape != x.shape else source)


def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **kwargs: Any
) -> Tensor:
    """As ``scaled_dot_product_attention``, of which the exporter knows that of tokens with heads [B, heads, N, d]."""
    attend, lead = functional.scaled_dot_product_attention, query.shape[:-2]
    if len(lead) == 2 or not lead == key.shape[:-2] == value.shape[:-2]:
        return attend(query, key, value, attn_mask, *args, **kwargs)
    q, k, v = (x.reshape(-1, 1, *x.shape[-2:]) for x in (query, key, value))
    if attn_mask is not None and attn_mask.ndim > 2:
        attn_mask = attn_mask.expand(*lead, *attn_mask.shape[-2:]).reshape(-1, 1, *attn_mask.shape[-2:])
    return attend(q, k, v, attn_mask, *args, **kwargs).reshape(*lead, query.shape[-2], value.shape[-1])


def _in_each(dimensions: int, convolution: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A convolution whose strides, paddings and the like may be lists of one number for all dimensions.

    The exporter writes such lists as they are, which ONNX does not know.
    """

    def each(value: Any) -> Any:
        return [*value] * dimensions if isinstance(value, list | tuple) and len(value) == 1 else value

    return lambda *args, **kwargs: convolution(*map(each, args), **{key: each(x) for key, x in kwargs.items()})


def _of_one_type(clamp: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A clamp whose bounds may be an integer and a real number, for which the exporter finds no operator."""

    def clamped(*args: Any, **kwargs: Any) -> Tensor:
        real = any(isinstance(value, float) for value in (*args, *kwargs.values()))

        def bound(value: Any) -> Any:
            return float(value) if real and isinstance(value, int) else value

        return clamp(*map(bound, args), **{key: bound(value) for key, value in kwargs.items()})

    return clamped


_CLAMPS = (torch.clamp, torch.clip, torch.clamp_, torch.clip_, Tensor.clamp, Tensor.clip, Tensor.clamp_, Tensor.clip_)
_WORDS: dict[Any, Callable[..., Tensor]] = {
    Tensor.data.__get__: Tensor.detach,  # type: ignore[attr-defined]  # of what is written there tracing loses sight
    Tensor.half: Tensor.float,
    Tensor.bfloat16: Tensor.float,
    torch.repeat_interleave: repeat_interleave,
    Tensor.repeat_interleave: repeat_interleave,
    Tensor.copy_: copy_,
    functional.pad: pad,
    functional.scaled_dot_product_attention: attention,
    **{clamp: _of_one_type(clamp) for clamp in _CLAMPS},
    torch.conv2d: _in_each(2, torch.conv2d),
    torch.conv3d: _in_each(3, torch.conv3d),
    torch.conv_transpose2d: _in_each(2, torch.conv_transpose2d),
    torch.conv_transpose3d: _in_each(3, torch.conv_transpose3d),
}


_HALF: set[Any] = {torch.float16, torch.bfloat16, torch.HalfTensor, torch.BFloat16Tensor}
_HALF |= {"torch.HalfTensor", "torch.BFloat16Tensor"}  # for Tensor.type
_PATCHING = Lock()  # torch has one class of autocast for all threads


def _in_float32(value: Any) -> Any:
    """An argument that asks for half precision, as one that asks for what the whole graph is in."""
    return torch.float32 if isinstance(value, torch.dtype | type | str) and value in _HALF else value


@contextmanager
def without_autocast() -> Iterator[None]:
    """While open, autocast has no effect where the code of this thread enters it: the whole graph is in float32."""
    original, thread = torch.autocast.__enter__, get_ident()

    def enter(context: torch.autocast) -> Any:
        enabled = context._enabled
        context._enabled = enabled and get_ident() != thread
        try:
            return original(context)  # type: ignore[no-untyped-call]
        finally:
            context._enabled = enabled

    with _PATCHING:
        torch.autocast.__enter__ = enter  # type: ignore[method-assign]
        try:
            yield
        finally:
            torch.autocast.__enter__ = original  # type: ignore[method-assign]


class InOtherWords(TorchFunctionMode):
    """Calls the functions of this module in the place of torch's own; ``reads`` names those that read values.

    Those are called as they are, or get their ``answers``.
    """

    def __init__(self, answers: Answers | None = None, reads: set[str] | None = None) -> None:
        super().__init__()
        self.reads = set() if reads is None else reads
        self._answers = answers

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tuple(map(_in_float32, args)), {key: _in_float32(value) for key, value in (kwargs or {}).items()}
        if found := what_is_read(func, args):
            self.reads.add(found[0])
            if self._answers is not None:
                return self._answers.result(found[0], func, args, kwargs)
        return _WORDS.get(func, func)(*args, **kwargs)
