"""Attention products with quantizers of their own on q, k, v and the softmax output (method section 3.8).

A product is quantized where ``scaled_dot_product_attention`` is called, inside whatever module calls it: joint, cross,
rotary, masked or grouped attention and any processor of diffusers are alike here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, partial, wraps
from itertools import chain, cycle, repeat
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode, _get_current_function_mode
from torch.utils.checkpoint import checkpoint

from ptq_tdq.errors import ModelError
from ptq_tdq.intervals import source_class
from ptq_tdq.modules.activation import ActivationQuantizer
from ptq_tdq.native.address import untraced
from ptq_tdq.records import LayerRecord
from ptq_tdq.timeaxis import at, present

OPERANDS = ("q", "k", "v", "softmax")
ALONG = (-1, -1, -2, -1)  # the dimension of each that its product sums over
BLOCK = 1 << 20  # scores that are computed at once, where rows are quantized apart from each other
ATTRIBUTE = "products"  # of the module that computes them; `<module>.products.<i>` is the i-th in its forward pass


def owner_of(name: str) -> tuple[str, int]:
    """The module that computes the product of this name, and the product's number in its forward pass (-1: none)."""
    owner, _, number = name.rpartition(f".{ATTRIBUTE}.")
    return owner, int(number) if number.isdecimal() and number.isascii() else -1


def in_blocks(record: LayerRecord) -> bool:
    """Whether large products may be computed block by block: no interval needs all probabilities of a sample."""
    return not source_class(record.inputs[-1].method).by_sample


class QuantProduct(nn.Module):
    """softmax(q k^T scale + mask) v with quantizers; with all of them off, torch's own function, bit for bit."""

    def __init__(self, record: LayerRecord) -> None:
        super().__init__()
        self.record = record
        self.inputs = nn.ModuleList(map(ActivationQuantizer, record.inputs, ALONG))

    def activation_quantizers(self) -> list[ActivationQuantizer]:
        return [q for q in self.inputs if isinstance(q, ActivationQuantizer)]

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
        """As ``torch.nn.functional.scaled_dot_product_attention``: query [B, heads, N, d], key and value [.., M, d]."""
        quantizers = self.activation_quantizers()
        if not any(q.enabled or q.observer for q in quantizers):
            return functional.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        on_query, on_key, on_value, on_softmax = quantizers
        # half precision overflows where torch's own function, which sums in float32, does not
        q, k, v = on_query(query).float(), on_key(key).float(), on_value(value).float()
        if enable_gqa:
            k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in (k, v))
        factor = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
        if is_causal:
            attn_mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
        apart = on_softmax.by_rows and not torch.compiler.is_compiling() and q.ndim > 2
        apart = apart and q.shape[:-2] == k.shape[:-2] == v.shape[:-2] and _scores(q, k) > BLOCK
        attend = self._in_blocks if apart else self._attend
        return lying_as(query, attend(q, k, v, attn_mask, factor)).to(query.dtype)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, factor: float, *interval: Tensor) -> Tensor:
        scores = (q @ k.transpose(-1, -2)).mul_(factor)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        # a row that may look at nothing gives zeros, as torch's own function does
        probabilities = scores.softmax(-1).nan_to_num(0.0) if mask is not None else scores.softmax(-1)
        out: Tensor = self.inputs[-1](probabilities, *interval) @ v
        return out

    def _in_blocks(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, factor: float) -> Tensor:
        """:meth:`_attend` block by block, each of which stays in the processor's cache.

        Gradients compute a block again, so none of the N x M scores and probabilities is kept.
        """
        softmax = self.activation_quantizers()[-1]
        assert softmax.source is not None
        # once, since a network in it may drop units at random
        own = () if softmax.source.by_token else softmax.interval(q)
        t, shape = present(len(q), q.device), (*q.shape[:-1], v.shape[-1])
        mask = None if mask is None else _four(mask.expand(*q.shape[:-1], k.shape[-2]))
        q, k, v = _four(q), _four(k), _four(v)
        # many rows of few heads, not few rows of many: products like that better
        samples, heads, rows = (max(1, BLOCK // n) for n in (_scores(q[:1], k), _scores(q[:1, :1], k), k.shape[-2]))

        def attend(t: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *own: Tensor) -> Tensor:
            with at(t):
                return self._attend(q, k, v, mask, factor, *own)

        run = partial(checkpoint, attend, use_reentrant=False, preserve_rng_state=False)
        found = []
        for now, queries, keys, values, seen, *interval in zip(
            *(_split(x, samples) for x in (t, q, k, v, mask, *own)), strict=False
        ):
            of_heads = []
            for q, k, v, mask in zip(*(_split(x, heads, 1) for x in (queries, keys, values, seen)), strict=False):
                blocks = zip(_split(q, rows, 2), _split(mask, rows, 2), strict=False)
                of_heads.append(torch.cat([run(now, block, k, v, part, *interval) for block, part in blocks], 2))
            found.append(torch.cat(of_heads, 1))
        return torch.cat(found).view(shape)


def lying_as(query: Tensor, out: Tensor) -> Tensor:
    """``out`` with heads inside of tokens in memory where the query's are: so torch's own function gives it, and code
    behind it may count on that (``out.transpose(1, 2).view(...)``).
    """
    if query.ndim != 4 or query.stride(1) >= query.stride(2):
        return out.contiguous()
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def _scores(q: Tensor, k: Tensor) -> int:
    return q.numel() // q.shape[-1] * k.shape[-2]


def _four(x: Tensor) -> Tensor:
    """x [B, ..., N, d] as [B, heads, N, d]."""
    return x if x.ndim == 4 else x.reshape(len(x), -1, *x.shape[-2:])


def _split(x: Tensor | None, size: int, dim: int = 0) -> Iterable[Any]:
    return repeat(None) if x is None else x.split(size, dim)


class _Intercept(TorchFunctionMode):
    """Hands the calls of scaled_dot_product_attention inside one module to its products, in order.

    Calls beyond them, which calibration has not seen, stay in floating point (an image prompt beside a text); inside
    :func:`one_by_one` they begin with the first one again. ``heard`` counts the calls; ``by_hand`` says whether the
    module computed a softmax outside of them while its products were not all heard.
    """

    def __init__(self, owner: nn.Module) -> None:
        super().__init__()
        self.owner, self.heard, self.softmax = owner, 0, False
        products = products_of(owner)
        beyond = repeat(functional.scaled_dot_product_attention)
        self.count = len(products)
        self.next = cycle(products) if _one_by_one.get() else chain(products, beyond)

    @property
    def by_hand(self) -> bool:
        return self.softmax and self.heard < self.count

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _HEARD or _computing.get():
            return func(*args, **(kwargs or {}))
        token = _computing.set(True)
        try:
            if func in _SOFTMAX:
                self.softmax = True
                return func(*args, **(kwargs or {}))
            self.heard += 1
            return next(self.next)(*args, **(kwargs or {}))
        finally:
            _computing.reset(token)


def _elsewhere(owner: nn.Module, how: str) -> ModelError:
    """What to say of a module that computes its attention where it is not quantized."""
    return ModelError(
        f"The {type(owner).__name__} computes attention {how}, where nothing is quantized; give it back the processor "
        "and the backend that it was calibrated with (pipe.disable_attention_slicing(), set_attn_processor, "
        "set_attention_backend), or use a pipeline that leaves it its own."
    )


_SOFTMAX = (functional.softmax, torch.softmax, Tensor.softmax)
_HEARD = {functional.scaled_dot_product_attention, *_SOFTMAX}
_one_by_one: ContextVar[bool] = ContextVar("whether modules may go through their samples one by one", default=True)
# torch's own function, where a product calls it, is not one of the products of a module around, nor a softmax its own
_computing: ContextVar[bool] = ContextVar("whether a product is being computed", default=False)


@contextmanager
def one_by_one(may: bool) -> Iterator[None]:
    """Say for a ``with`` block whether modules may go through their samples one by one, each with all products."""
    token = _one_by_one.set(may)
    try:
        yield
    finally:
        _one_by_one.reset(token)


def products_of(owner: nn.Module) -> list[Any]:
    """What computes the products of a module, in the order of its forward pass."""
    products = owner._modules.get(ATTRIBUTE)
    return list(products) if isinstance(products, nn.ModuleList) else []


def attach(owner: nn.Module, product: nn.Module) -> None:
    """Give ``owner`` one more product, called as ``scaled_dot_product_attention`` is; the first one makes it listen."""
    if ATTRIBUTE not in owner._modules:
        owner.add_module(ATTRIBUTE, nn.ModuleList())
        owner.__class__ = _listening(type(owner))  # type: ignore[arg-type]
    products = owner._modules[ATTRIBUTE]
    assert isinstance(products, nn.ModuleList)
    products.append(product)


@cache
def _listening(cls: type[nn.Module]) -> Any:
    """The class ``cls`` whose calls are listened to.

    Hooks would not do: torch does not run them when Ctrl-C ends a call, and the next call would find the mode in force.
    """

    @untraced  # a graph that breaks inside of the mode would lose it
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with _Intercept(self) as mode:
            out = cls.__call__(self, *args, **kwargs)
        if mode.by_hand:
            raise _elsewhere(self, "by hand")
        return out

    @wraps(cls.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:  # what a cache answers does not come here
        out = cls.forward(self, *args, **kwargs)
        mode = None if torch.compiler.is_compiling() else _get_current_function_mode()
        replaceable = hasattr(self, "processor")  # others may have nothing to attend to in a call
        if replaceable and isinstance(mode, _Intercept) and mode.owner is self and not (mode.heard or mode.by_hand):
            raise _elsewhere(self, "without scaled_dot_product_attention")
        return out

    return called_by(cls, call, _listening, forward=forward)


def called_by(cls: type[nn.Module], call: Callable[..., Any], make: Callable[[Any], Any], **others: Any) -> Any:
    """The class ``cls`` under its own name, whose calls are ``call`` and which has ``others`` as attributes.

    ``make`` gives that class again where one of its modules is unpickled.
    """

    def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        return _unpickled, (make, cls), *object.__reduce_ex__(self, protocol)[2:]

    own = {"__call__": call, "__reduce_ex__": reduce, "__module__": cls.__module__, "__doc__": cls.__doc__}
    return type(cls.__name__, (cls,), own | others)


def _unpickled(make: Callable[[Any], Any], cls: type[nn.Module]) -> Any:
    made = make(cls)
    return made.__new__(made)
