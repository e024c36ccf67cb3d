"""What every quantizer of fine-tuning is: how an activation is quantized while it learns, and with which gradients.

Interval sources say which scale and zero point hold at t; a quantizer says what they do to x. So each works with every
source: "LSQ + TDQ" is quantizer ``lsq`` and method ``tdq``. When learning ends, all of them are the same affine codes.

A quantizer is one file in this folder with one subclass of :class:`Quantizer`; naming a ``name`` registers it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ptq_tdq.errors import ConfigError
from ptq_tdq.scheme import QType


class Quantizer(ABC):
    """One activation's quantizer, called in the place of :func:`~ptq_tdq.affine.fake_quantize`.

    ``absorbs`` says whether a weight behind the activation can take over a constant factor: there is none behind the
    operands of attention products. ``ratio``, where a quantizer learns it, is the logarithm of such a factor.
    ``held`` says that the interval must stay where it is against 0. ``shift``, where a quantizer ``moves`` the others,
    is what it learns to add to their centre, in half-widths.
    For the last part of the iterations ``frozen`` is set where a quantizer ``freezes``: intervals learn no more.
    ``penalty`` is what the last forward pass adds to the loss.
    """

    name: ClassVar[str]
    freezes: ClassVar[bool] = False
    moves: ClassVar[bool] = False
    registry: ClassVar[dict[str, type[Quantizer]]] = {}

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        Quantizer.registry[cls.name] = cls

    def __init__(self, absorbs: bool = False, held: bool = False) -> None:
        self.ratio: nn.Parameter | None = None
        self.shift: nn.Parameter | None = None
        self.frozen = False
        self.penalty: Tensor | None = None

    @abstractmethod
    def __call__(self, x: Tensor, scale: Tensor, zero_point: Tensor, qtype: QType) -> Tensor:
        """``x`` as its codes stand for it (or a proxy of that), differentiable; scale and zero_point broadcast."""

    def learned(self) -> list[nn.Parameter]:
        """What it learns beside the source of its intervals."""
        return [p for p in (self.ratio, self.shift) if p is not None]

    def moved(self, zero_point: Tensor, qtype: QType) -> Tensor:
        """``z - round(shift (qmax - qmin) / 2)`` among the codes, float32; the gradient passes straight through."""
        if self.shift is None:
            return zero_point.float()
        away = self.shift * ((qtype.qmax - qtype.qmin) / 2)
        value = (zero_point - away.detach().round()).clamp(qtype.qmin, qtype.qmax)
        return with_gradient_of(zero_point - away, value)


def ends(scale: Tensor, zero_point: Tensor, qtype: QType) -> tuple[Tensor, Tensor]:
    """The values of the lowest and of the highest code."""
    return scale * (qtype.qmin - zero_point), scale * (qtype.qmax - zero_point)


class _Instead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, proxy: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad


def with_gradient_of(proxy: Tensor, value: Tensor) -> Tensor:
    """``value``, whose gradients are those of ``proxy``."""
    return _Instead.apply(value, proxy)  # type: ignore[no-any-return, no-untyped-call]


def quantizer_class(name: str) -> type[Quantizer]:
    """The class of this name; raises :class:`ConfigError` that lists the names."""
    if name in Quantizer.registry:
        return Quantizer.registry[name]
    raise ConfigError(f"The quantizer must be one of {', '.join(sorted(Quantizer.registry))}. Got {name!r} instead.")
