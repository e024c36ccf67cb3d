"""``tdq``: the Temporal Dynamic Quantization module (So et al., NeurIPS 2023; supp Tables 2, 3 and 7)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ptq_tdq.intervals.base import Observed
from ptq_tdq.intervals.mlp import ModuleInterval

DIMENSION, HIDDEN, DROPOUT, MAX_PERIOD = 128, 64, 0.2, 10000.0


class TimeEncoding(nn.Module):
    """t [B] -> [B, d]: "none" (raw t, d = 1), "normalize" (t / T, d = 1), "fourier" (random), "frequency".

    frequency: f_i = 10000^(-i / half), enc = [cos(t f_i), sin(t f_i)], half = d / 2. fourier draws f_i from a normal
    distribution and uses 2 pi f_i t / T.

    Waves are damped by exp(-(f_i gap)^2 / 2), their mean over normal t of deviation ``gap``, the distance between
    observed steps: between these a wave with a shorter period could take any value.
    """

    def __init__(self, kind: str, num_train_timesteps: int, gap: float = 0.0) -> None:
        super().__init__()
        self.kind, self.num_train_timesteps = kind, num_train_timesteps
        half = DIMENSION // 2
        if kind == "fourier":
            frequencies = 2 * math.pi * torch.randn(half) / num_train_timesteps
        else:
            frequencies = MAX_PERIOD ** (-torch.arange(half) / half)
        self.register_buffer("frequencies", frequencies)
        self.register_buffer("damping", torch.exp(-(frequencies * gap).square() / 2).repeat(2))
        self.frequencies: Tensor
        self.damping: Tensor
        self.width = DIMENSION if kind in ("fourier", "frequency") else 1

    def forward(self, t: Tensor) -> Tensor:
        t = t.to(torch.float32)[:, None]
        if self.kind == "none":
            return t
        if self.kind == "normalize":
            return t / self.num_train_timesteps
        angle = t * self.frequencies
        return torch.cat([angle.cos(), angle.sin()], dim=1) * self.damping


def initialize(net: nn.Sequential, kind: str) -> None:
    """Weights of every linear layer by name: "he" is torch's own start, biases too; else biases are 0 (supp Table 7).

    "gaussian" is N(0, 1).
    """
    for layer in net:
        if not isinstance(layer, nn.Linear) or kind == "he":
            continue
        if kind == "gaussian":
            nn.init.normal_(layer.weight)
        elif kind == "xavier":
            nn.init.xavier_normal_(layer.weight)
        else:
            nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)


def make_net(width: int) -> nn.Sequential:
    """MLP d-64-64-64-1, ReLU, dropout 0.2 before the last linear layer (supp Table 3), for d = ``width``."""
    return nn.Sequential(
        nn.Linear(width, HIDDEN),
        nn.ReLU(),
        nn.Linear(HIDDEN, HIDDEN),
        nn.ReLU(),
        nn.Linear(HIDDEN, HIDDEN),
        nn.ReLU(),
        nn.Dropout(DROPOUT),
        nn.Linear(HIDDEN, 1),
    )


class TDQ(ModuleInterval):
    """The net of supp Table 3 and softplus."""

    pattern = "tdq"

    @classmethod
    def build(cls, method: str, observed: Observed) -> TDQ:
        encode = TimeEncoding(observed.choices.time_encoding, observed.num_train_timesteps, observed.gap)
        net = make_net(encode.width)
        initialize(net, observed.choices.module_weights)
        return cls(encode, net, observed)
