"""A fixed rotation R of channels that spreads large ones over all: W x = (W R^T) (R x).

    R = (I - 2/m 11^T) (x) H_b / sqrt(b) diag(d),    C = m b, b the largest power of two in C

H_b is Hadamard's matrix (QuaRot, arXiv 2404.00456). Where C is no power of two, a Householder reflection mixes its m
blocks, so any number of channels is rotated whole, by log2(b) + 2 additions for each number. The signs d are the
sequence of Rudin and Shapiro, whose Hadamard transform is flat: what all channels have in common, as behind a ReLU, is
spread too instead of piling up in one.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

WIDEST = 64  # columns of a matrix that is multiplied with


def rotated(x: Tensor) -> Tensor:
    """R times each of the vectors of x [..., C]."""
    block = block_of(x.shape[-1])
    right = min(block, WIDEST)  # H_b is a Kronecker product of smaller ones
    y: Tensor = (x * signs(x.shape[-1]).to(x)).unflatten(-1, (-1, block // right, right))
    y = y @ (hadamard(right) * block**-0.5).to(x)
    if block > right:
        y = hadamard(block // right).to(x) @ y
    y = y.flatten(-2)
    blocks = y.shape[-2]
    if blocks > 1:
        y = y - y.sum(-2, keepdim=True) * (2 / blocks)
    rotated: Tensor = y.flatten(-2)
    return rotated


@lru_cache
def hadamard(size: int) -> Tensor:
    """H [size, size] of a power of two, entries 1 and -1."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.kron(torch.tensor([[1, 1], [1, -1]]), matrix)
    return matrix


def block_of(channels: int) -> int:
    """The largest power of two that divides the number of channels."""
    return channels & -channels


@lru_cache
def signs(channels: int) -> Tensor:
    """d [C]: -1 where the binary digits of the channel's number have an odd number of pairs 11."""
    return torch.tensor([1.0 - 2.0 * ((c & c >> 1).bit_count() % 2) for c in range(channels)])
