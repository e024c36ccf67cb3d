"""Passes over tokens or pixels that ``native.c`` goes through in one call: a plan, made once for inputs of one shape.

All that passes read and write is float32 [B, N, C], or images [B, H, W, C], without gaps; what lies between two of them
is memory of C's own.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ptq_tdq.errors import RuntimeUnsupportedError
from ptq_tdq.native.address import address, untraced
from ptq_tdq.rotate import signs
from ptq_tdq.runtime.attention import AttentionSizes, IntegerProduct, tops
from ptq_tdq.runtime.kernels import Activation, Norm, TokenNorm
from ptq_tdq.runtime.layer import ChannelRange, IntegerLayer, IntegerLinear, WeightOnlyLayer
from ptq_tdq.runtime.native_layer import NativeCall
from ptq_tdq.runtime.step import Interval, Step

FLOAT_BYTES = 4
ALIGNED = 64  # bytes: a line of the cache
SCRATCH, NOWHERE = 0, -1  # pointers, as in native.c
INTERVALS = 2  # pointers after SCRATCH: scales and zero points
NORMALIZE, LAYER, ATTEND, WEIGH = range(4)
MOST = 64  # plans of a block, which may be called with tokens of any number


class _Place(ctypes.Structure):
    """``Place`` of native.c."""

    _fields_ = [("pointer", ctypes.c_int64), ("offset", ctypes.c_int64)]


class _TokenNorm(ctypes.Structure):
    """``TokenNorm`` of native.c."""

    _sizes_ = ("samples", "tokens", "channels", "centered", "step")
    _fields_ = [
        *((name, ctypes.c_int64) for name in _sizes_),
        *((name, ctypes.c_void_p) for name in ("weight", "bias", "signs")),
        ("epsilon", ctypes.c_float),
    ]


class _Weights(ctypes.Structure):
    """``Weights`` of native.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("codes", "scale", "bias")),
        *((name, ctypes.c_int64) for name in ("rows", "channels", "outputs", "silu")),
    ]


class _Pass(ctypes.Structure):
    """``Pass`` of native.c."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("kind", "interval", "span", "step")),
        *((name, ctypes.c_void_p) for name in ("what", "frame", "convolution")),
        ("source", _Place * 4),
        ("target", _Place),
    ]


class Place(NamedTuple):
    """Where numbers of a shape are: bytes from a pointer of the call, samples so many values apart."""

    pointer: int
    shape: tuple[int, ...]
    offset: int = 0
    step: int = 0

    def chunk(self, index: int) -> Place:
        """One of the K rows of each sample: [B, K, C] -> [B, C]."""
        samples, rows, channels = self.shape
        offset = self.offset + FLOAT_BYTES * index * channels
        return Place(self.pointer, (samples, channels), offset, rows * channels if samples > 1 else 0)


class Modulation(NamedTuple):
    """What follows a norm, x (1 + scale) + shift, and what multiplies a branch's result: [B or 1, C] of one tensor."""

    scale: Place
    shift: Place
    gate: Place | None = None


def in_passes(layer: nn.Module | None, kind: type[IntegerLayer], *, normed: bool = False) -> bool:
    """Whether a layer is of this very kind and all of it, behind a norm or not, is passes by intervals from tables."""
    return (
        type(layer) is kind
        and getattr(layer, "padding_mode", "zeros") == "zeros"
        and all(part.native is not None for part in layer.parts)
        and all(layer.step.columns([part.quantizer]) is not None for part in layer.parts)
        and (layer.gain is None or not normed)  # kernels take one of the two
    )


class Plan:
    """Built pass by pass for ``samples``; then called with the tensors that were announced, in their order."""

    def __init__(self, library: ctypes.CDLL, step: Step, samples: int, *, each: bool) -> None:
        """Where ``each``, samples have intervals of their own."""
        self._function = library.go
        self._function.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p]
        self._function.restype = ctypes.c_int
        self._step, self._samples, self._each = step, samples, each
        self._given: list[tuple[str, tuple[int, ...]]] = []
        self._passes: list[_Pass] = []
        self._list: ctypes.Array[_Pass] | None = None
        self._next = self._scratch = 0  # bytes of memory between passes: where what comes next begins, and of all
        self._alive: list[object] = []  # whose addresses C has
        self._last: tuple[Interval | None, tuple[int, int]] = None, (0, 0)

    @untraced
    def __call__(self, *tensors: Tensor) -> None:
        """Raises :class:`RuntimeUnsupportedError` for tensors other than those announced."""
        if self._list is None:
            self._list = (_Pass * len(self._passes))(*self._passes)
        found = zip(self._given, tensors, strict=True)
        pointers = (
            None,
            *self._intervals(),
            *[address(what, x, torch.float32, shape) for (what, shape), x in found],
        )
        given = (ctypes.c_void_p * len(pointers))(*pointers)
        if self._function(self._list, len(self._list), self._scratch, given):
            raise MemoryError

    def _intervals(self) -> tuple[int, int]:
        """The addresses of scales and zero points; those of the last call, where the same tensors are asked for."""
        found, (known, addresses) = self._step.together(self._samples), self._last
        if found is not known:
            shape = (found.scale.shape[0], *([self._samples] if self._each else []))
            addresses = (
                address("scales", found.scale, torch.float32, shape),
                address("zero points", found.zero_point, torch.int32, shape),
            )
            self._last = found, addresses  # at once, since threads share plans
        return addresses

    def given(self, what: str, shape: Sequence[int]) -> Place:
        """Announces a tensor that calls pass, to read or to write."""
        self._given.append((what, tuple(shape)))
        return Place(SCRATCH + INTERVALS + len(self._given), tuple(shape))

    def between(self, *shape: int) -> Place:
        """Memory for what one pass leaves to another."""
        place = Place(SCRATCH, shape, self._next)
        self._next += -(-FLOAT_BYTES * prod(shape) // ALIGNED) * ALIGNED
        self._scratch = max(self._scratch, self._next)
        return place

    @contextmanager
    def branch(self) -> Iterator[None]:
        """A ``with`` block whose passes leave nothing to those after it: they have its memory again."""
        start = self._next
        yield
        self._next = start

    def normalize(self, x: Place, norm: TokenNorm, modulation: Modulation | None, *, rotate: bool) -> Place:
        """x [B, N, C] -> the same behind a norm and what follows it, rotated or not."""
        samples, tokens, channels = x.shape
        scale, shift = modulation[:2] if modulation else (None, None)
        self._check_rows(scale, channels)
        self._check_rows(shift, channels)
        made = _TokenNorm(samples, tokens, channels, norm.centered, scale.step if scale else 0, epsilon=norm.epsilon)
        flips = signs(channels) if rotate else None
        made.weight, made.bias, made.signs = (
            None if values is None else address(f"the {what} of a norm", values, torch.float32, (channels,))
            for what, values in (("weight", norm.weight), ("bias", norm.bias), ("signs", flips))
        )
        self._alive += [made, norm, flips]
        out = self.between(*x.shape)
        self._add(NORMALIZE, [x, scale, shift], out, what=made)
        return out

    def layer(
        self,
        layer: IntegerLinear,
        x: Place,
        activation: Activation | None = None,
        *,
        rotated: bool = False,
        onto: Place | None = None,
        gate: Place | None = None,
        to: Place | None = None,
    ) -> Place:
        """x [B, N, C], ``rotated`` or not yet -> [B, N, O], times the gate [B or 1, O] and added to ``onto``."""
        (part,), (samples, tokens, channels) = layer.parts, x.shape
        before = layer.before(activation)
        before = before._replace(rotate=None) if rotated else before
        assert part.native is not None
        # one interval for all: one long row of pixels, which the kernel likes better than many short ones
        rows = samples if self._each else 1
        call = part.native.call_of(rows, channels, samples * tokens // rows, 1, self._each, 1, before)
        shape = (samples, tokens, call.shape[1])
        self._check_rows(gate, shape[-1])
        return self._products(part, call, shape, [x, onto, gate], to)

    def convolve(
        self,
        layer: IntegerLayer,
        x: Place,
        activation: Activation | None = None,
        *,
        norm: Norm | None = None,
        shift: Place | None = None,
        onto: Place | None = None,
        to: Place | None = None,
    ) -> Place:
        """x [B, H, W, C], behind a norm of x + shift [B, C] or not -> [B, H', W', O], added to ``onto``."""
        samples, height, width, channels = x.shape
        if shift is not None and shift.shape != (samples, channels):
            raise RuntimeUnsupportedError(f"A shift {list(shift.shape)} does not fit {list(x.shape)}.")
        before = layer.before(activation, norm)
        for part in layer.parts:  # a range of channels; the sums of all add up
            assert part.native is not None
            call = part.native.call_of(samples, channels, height, width, self._each, 1, before)
            _, outputs, *size = call.shape
            onto = to = self._products(part, call, (samples, *size, outputs), [x, onto, None, shift], to)
        assert to is not None
        return to

    def attend(
        self, product: IntegerProduct, operands: tuple[Place, Place, Place], heads: int, mask: Place | None
    ) -> Place:
        """q [B, N, heads d], k [B, M, heads d], v [B, M, heads e] -> [B, N, heads e]; mask [B, heads, N or 1, M]."""
        (samples, queries, inner), (_, keys, inner_keys), (_, keys_of_v, values) = (x.shape for x in operands)
        columns = product.step.columns(product.record.inputs)
        if inner_keys != inner or keys != keys_of_v or inner % heads or values % heads or columns is None:
            raise RuntimeUnsupportedError(f"No attention of {heads} heads: {[list(x.shape) for x in operands]}.")
        sizes = samples, queries, keys, heads, heads, inner // heads, values // heads, int(self._each)
        steps = (0, 0, 0)
        if mask is not None:
            rows = mask.shape[2]
            if mask.shape not in [(samples, heads, n, keys) for n in (1, queries)]:
                raise RuntimeUnsupportedError(f"A mask {list(mask.shape)} for {queries} x {keys} scores.")
            steps = (heads * rows * keys, rows * keys, keys if rows > 1 else 0)
        made = AttentionSizes(*sizes, *steps, (inner // heads) ** -0.5, tops(product.bits))
        self._alive.append(made)
        out = self.between(samples, queries, values)
        self._add(ATTEND, [*operands, mask], out, interval=self._interval(columns), what=made)
        return out

    def weight_only(self, layer: WeightOnlyLayer, x: Place, *, silu: bool = False, onto: Place | None = None) -> Place:
        """x [B, C], behind a SiLU or not -> [B, O], added to ``onto``; a linear with weights of integers."""
        (rows, channels), outputs = x.shape, len(layer.codes)
        # not the parameters, which may get other memory
        scale, bias = layer.scale.detach(), None if layer.bias is None else layer.bias.detach()
        made = _Weights(
            address("weights", layer.codes, torch.int8, (outputs, channels)),
            address("the scales of weights", scale, torch.float32, (outputs,)),
            None if bias is None else address("a bias", bias, torch.float32, (outputs,)),
            *(rows, channels, outputs, silu),
        )
        if onto is not None and onto.shape != (rows, outputs):
            raise RuntimeUnsupportedError(f"Products of the shape {[rows, outputs]} do not fit {list(onto.shape)}.")
        self._alive += [made, layer.codes, scale, bias]
        out = self.between(rows, outputs)
        self._add(WEIGH, [x, onto], out, what=made)
        return out

    def _products(
        self,
        part: ChannelRange,
        call: NativeCall,
        shape: tuple[int, ...],
        source: Sequence[Place | None],
        to: Place | None,
    ) -> Place:
        """Those of a layer's range; ``source`` is x, what they are added to, a gate and a shift."""
        onto, gate = source[1:3]
        out = self.between(*shape) if to is None else to
        if out.shape != shape or (gate if onto is None else onto.shape != shape):  # C gates what it adds
            raise RuntimeUnsupportedError(f"Products of the shape {list(shape)} do not fit {onto} and {out}.")
        columns = self._step.columns([part.quantizer])
        assert columns is not None
        self._alive += [call, part.native]
        self._add(
            LAYER,
            source,
            out,
            interval=self._interval(columns),
            span=prod(shape[1:-1]) if gate is None or gate.step else prod(shape[:-1]),
            step=0 if gate is None else gate.step,
            what=call.alive[0],
            frame=call.alive[1],
            convolution=call.alive[2],
        )
        return out

    def _interval(self, columns: range) -> int:
        return columns.start * (self._samples if self._each else 1)

    def _check_rows(self, place: Place | None, channels: int) -> None:
        """Raise unless the place has a row of so many channels for all samples, or one for each."""
        if place is not None and (place.shape[1:] != (channels,) or place.shape[0] not in (1, self._samples)):
            raise RuntimeUnsupportedError(f"{list(place.shape)} are no rows of {channels} for {self._samples} samples.")

    def _add(self, kind: int, source: Sequence[Place | None], target: Place, **numbers: int | ctypes.Structure) -> None:
        made = _Pass(kind)
        for name, value in numbers.items():
            setattr(made, name, value if isinstance(value, int) else ctypes.addressof(value))
        for index in range(len(made.source)):
            place = source[index] if index < len(source) else None
            made.source[index] = _Place(NOWHERE, 0) if place is None else _Place(place.pointer, place.offset)
        made.target = _Place(target.pointer, target.offset)
        self._passes.append(made)


class Plans:
    """A block's plans by what they were made for, the ``MOST`` latest ones; a copy of the model makes its own."""

    def __init__(self) -> None:
        self._made: dict[tuple[object, ...], Plan] = {}

    def __len__(self) -> int:
        return len(self._made)

    def __deepcopy__(self, memo: dict[int, object]) -> Plans:
        return Plans()

    def find(self, key: tuple[object, ...], make: Callable[[], Plan]) -> Plan:
        """The plan for ``key``; made where there is none."""
        plan = self._made.get(key)
        if plan is None:
            plan = make()
            for old in [*self._made][: max(0, len(self._made) - MOST + 1)]:
                self._made.pop(old, None)  # another thread may have been faster
            self._made[key] = plan
        return plan
