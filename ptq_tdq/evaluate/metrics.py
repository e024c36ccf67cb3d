"""Distances of tensors to their full-precision reference."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sqnr_db(reference: Tensor, x: Tensor) -> float:
    """Signal to quantization noise ratio ``10 log10(sum ref^2 / sum (ref - x)^2)`` in dB; inf for equal tensors."""
    signal = reference.double().square().sum().item()
    noise = (reference.double() - x.double()).square().sum().item()
    return ratio_db(signal, noise)


def ratio_db(signal: float, noise: float) -> float:
    """``10 log10(signal / noise)`` of two energies; inf without noise, -inf without a signal."""
    return math.inf if noise == 0 else 10 * math.log10(signal / noise) if signal else -math.inf


def psnr_db(reference: Tensor, x: Tensor, peak: float) -> float:
    """Peak signal to noise ratio ``10 log10(peak^2 / mean (ref - x)^2)`` in dB; inf for equal tensors."""
    noise = torch.nn.functional.mse_loss(x.double(), reference.double()).item()
    return math.inf if noise == 0 else 10 * math.log10(peak * peak / noise)
