"""Integer codes in bytes: 2- and 4-bit codes share a byte, low bits first; every other width takes one byte each."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from ptq_tdq.errors import ArtifactCorruptError, UsageError
from ptq_tdq.scheme import QType


def codes_per_byte(bits: int) -> int:
    """Codes that share one byte: 4 at 2 bits, 2 at 4 bits, else 1; raises :class:`SchemeError` outside 2..8 bits."""
    return {2: 4, 4: 2}.get(QType(bits).bits, 1)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack uint8 ``codes`` of any shape, in row-major order, into uint8 [ceil(numel / codes_per_byte)].

    Code i of a byte takes the bits from i * bits up; unused bits of the last byte are 0.
    Raises :class:`UsageError` for another dtype or a code above 2^bits - 1.
    """
    per_byte = codes_per_byte(bits)
    if codes.dtype != torch.uint8 or (codes.numel() and int(codes.max()) > QType(bits).qmax):
        raise UsageError(f"The codes must be uint8 from 0 to {QType(bits).qmax} for {bits} bits; quantize them first.")
    flat = codes.reshape(-1)
    slots = torch.nn.functional.pad(flat, (0, -flat.numel() % per_byte)).reshape(-1, per_byte)
    packed = slots[:, 0].clone()
    for i in range(1, per_byte):
        packed |= slots[:, i] << (bits * i)
    return packed


def unpack(packed: Tensor, bits: int, shape: Sequence[int]) -> Tensor:
    """Inverse of :func:`pack`: uint8 codes of ``shape``.

    Raises :class:`ArtifactCorruptError` when ``packed`` is not the uint8 vector that ``shape`` needs.
    """
    per_byte, numel = codes_per_byte(bits), prod(shape)
    if packed.dtype != torch.uint8 or packed.shape != (-(-numel // per_byte),):
        raise ArtifactCorruptError(
            f"{numel} codes of {bits} bits need {-(-numel // per_byte)} packed bytes. "
            f"Got {packed.dtype} {list(packed.shape)} instead; make the artifact again."
        )
    mask = (1 << 8 // per_byte) - 1
    slots = [(packed >> (bits * i)) & mask for i in range(per_byte)]
    return torch.stack(slots, dim=-1).reshape(-1)[:numel].reshape(tuple(shape))
