"""``tdq-thin``: a 3-layer MLP with 16 hidden units, for calibration on few samples (supp s5).

The paper gives it u = t / T ("normalize"); the other encodings are for comparison.
"""

from __future__ import annotations

from torch import nn

from ptq_tdq.intervals.base import Observed
from ptq_tdq.intervals.mlp import ModuleInterval
from ptq_tdq.intervals.tdq import TimeEncoding, initialize

HIDDEN = 16
ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "silu": nn.SiLU, "tanh": nn.Tanh}


class TDQThin(ModuleInterval):
    """MLP d-16-16-1 and softplus; d = 1 for u."""

    pattern = "tdq-thin"

    @classmethod
    def build(cls, method: str, observed: Observed) -> TDQThin:
        activation = ACTIVATIONS[observed.choices.thin_activation]
        encode = TimeEncoding(observed.choices.thin_encoding, observed.num_train_timesteps, observed.gap)
        net = nn.Sequential(
            nn.Linear(encode.width, HIDDEN), activation(), nn.Linear(HIDDEN, HIDDEN), activation(), nn.Linear(HIDDEN, 1)
        )
        initialize(net, observed.choices.module_weights)
        return cls(encode, net, observed)
