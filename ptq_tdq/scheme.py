"""Bit widths: ``QType`` for one tensor, ``Scheme`` for the pair that a user names ("W4A6")."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ptq_tdq.errors import SchemeError

MIN_BITS, MAX_BITS = 2, 8


@dataclass(frozen=True)
class QType:
    """An integer code of ``bits`` bits: signed codes are -2^(n-1)..2^(n-1)-1, unsigned 0..2^n-1."""

    bits: int
    signed: bool = False

    def __post_init__(self) -> None:
        if not MIN_BITS <= self.bits <= MAX_BITS:
            raise SchemeError(f"A bit width must be between {MIN_BITS} and {MAX_BITS}. Got {self.bits} instead.")

    @property
    def qmin(self) -> int:
        return -(1 << (self.bits - 1)) if self.signed else 0

    @property
    def qmax(self) -> int:
        return self.qmin + (1 << self.bits) - 1


@dataclass(frozen=True)
class Scheme:
    """Bits of weights and activations, written ``W<bits>A<bits>``."""

    weight_bits: int
    activation_bits: int

    @classmethod
    def parse(cls, text: str) -> Scheme:
        """Read "W4A8" (case and spaces around it do not matter); raises :class:`SchemeError` for anything else.

        ``str()`` of the result is the one spelling that artifacts hold.
        """
        match = re.fullmatch(rf"[wW]([{MIN_BITS}-{MAX_BITS}])[aA]([{MIN_BITS}-{MAX_BITS}])", text.strip())
        if match is None:
            raise SchemeError(
                f"The scheme must be written W<bits>A<bits> with {MIN_BITS} to {MAX_BITS} bits each, "
                f"for example W4A8. Got {text!r} instead."
            )
        return cls(*map(int, match.groups()))

    def __str__(self) -> str:
        return f"W{self.weight_bits}A{self.activation_bits}"
