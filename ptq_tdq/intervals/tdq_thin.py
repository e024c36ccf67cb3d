"""``tdq-thin``: a 3-layer MLP with 16 hidden units on u = t / T, for calibration on few samples (supp s5)."""

from __future__ import annotations

from torch import nn

from ptq_tdq.intervals.base import Observed
from ptq_tdq.intervals.mlp import ModuleInterval
from ptq_tdq.intervals.tdq import TimeEncoding, initialize

HIDDEN = 16
ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "silu": nn.SiLU, "tanh": nn.Tanh}


class TDQThin(ModuleInterval):
    """MLP 1-16-16-1 and softplus."""

    pattern = "tdq-thin"

    @classmethod
    def build(cls, method: str, observed: Observed) -> TDQThin:
        activation = ACTIVATIONS[observed.options.activation]
        net = nn.Sequential(
            nn.Linear(1, HIDDEN), activation(), nn.Linear(HIDDEN, HIDDEN), activation(), nn.Linear(HIDDEN, 1)
        )
        initialize(net, observed.options.weights)
        source = cls(TimeEncoding("normalize", observed.num_train_timesteps), net, observed.zero_point())
        source.start(observed)
        return source
