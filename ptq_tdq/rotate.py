"""A fixed rotation R of channels that spreads large ones over all: W x = (W R^T) (R x).

    R = (I - 2/m 11^T) (x) H_b / sqrt(b) diag(d),    C = m b, b the largest power of two in C

H_b is Hadamard's matrix (QuaRot, arXiv 2404.00456). Where C is no power of two, a Householder reflection mixes its m
blocks, so any number of channels is rotated whole, by log2(b) + 2 additions for each number. The signs d are the
sequence of Rudin and Shapiro, whose Hadamard transform is flat: what all channels have in common, as behind a ReLU, is
spread too instead of piling up in one.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import lru_cache

import torch
from torch import Tensor, nn

WIDEST = 64  # columns of a matrix that is multiplied with


def rotated(x: Tensor) -> Tensor:
    """R times each of the vectors of x [..., C]."""
    flips, left, right = _factors(x)
    y: Tensor = (x * flips).unflatten(-1, (-1, len(left), len(right)))
    y = y @ right
    if len(left) > 1:
        y = left @ y
    y = y.flatten(-2)
    blocks = y.shape[-2]
    if blocks > 1:
        y = y - y.sum(-2, keepdim=True) * (2 / blocks)
    rotated: Tensor = y.flatten(-2)
    return rotated


def unrotated(x: Tensor) -> Tensor:
    """The inverse of R times each of the vectors of x [..., C]: R is symmetric but for its signs."""
    flips, _, _ = _factors(x)
    return rotated(x * flips) * flips


def _factors(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """d [C] and two Hadamard matrices, of which the second is scaled, whose Kronecker product is that of R; as x is.

    Made once, except where x stands for other tensors, as in an export.
    """
    kept = type(x) in (Tensor, nn.Parameter) and not torch.compiler.is_compiling()
    with nullcontext() if not kept else torch.inference_mode(False):  # learning may need them later
        return (_made if kept else _made.__wrapped__)(x.shape[-1], x.device, x.dtype)


@lru_cache
def _made(channels: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    block = block_of(channels)
    right = min(block, WIDEST)  # H_b is a Kronecker product of smaller ones
    left, scaled = hadamard(block // right), hadamard(right) * block**-0.5
    return signs(channels).to(device, dtype), left.to(device, dtype), scaled.to(device, dtype)


def factors(channels: int, columns: int) -> tuple[Tensor, Tensor]:
    """R without its signs as a Kronecker product of two float32 matrices, the right one of at most ``columns``."""
    block = block_of(channels)
    right = min(block, columns)
    blocks, left = channels // block, hadamard(block // right)
    if blocks > 1:
        left = torch.kron(torch.eye(blocks, dtype=left.dtype) - 2 / blocks, left)
    return left.float(), (hadamard(right) * block**-0.5).float()


def hadamard(size: int) -> Tensor:
    """H [size, size] of a power of two, entries 1 and -1."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.kron(torch.tensor([[1, 1], [1, -1]]), matrix)
    return matrix


def block_of(channels: int) -> int:
    """The largest power of two that divides the number of channels."""
    return channels & -channels


def signs(channels: int) -> Tensor:
    """d float32 [C]: -1 where the binary digits of the channel's number have an odd number of pairs 11."""
    return torch.tensor([1.0 - 2.0 * ((c & c >> 1).bit_count() % 2) for c in range(channels)], dtype=torch.float32)
