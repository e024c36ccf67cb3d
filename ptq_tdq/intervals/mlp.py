"""What sources with a network share: an MLP whose softplus is the interval, and how it starts."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from ptq_tdq.errors import NonFiniteError
from ptq_tdq.intervals.base import IntervalSource, Observed
from ptq_tdq.timeaxis import lookup

DIVERGED = (
    "A network of the time step diverges on the way to its first intervals; choose another time encoding, or "
    "module_start=as-is."
)


def inverse_softplus(y: Tensor) -> Tensor:
    """x with softplus(x) = y, for y > 0; exact for small y, where log(exp(y) - 1) would lose all digits."""
    return y + torch.log(-torch.expm1(-y))


def scale_of(net: nn.Sequential, features: Tensor) -> Tensor:
    """``features`` [B, d] -> scale [B], positive: softplus underflows to 0 for a very negative input."""
    return functional.softplus(net(features).squeeze(-1)).clamp(min=torch.finfo(torch.float32).tiny)


def start(net: nn.Sequential, features: Tensor, observed: Observed) -> None:
    """Set the last bias to the static interval, then fit log s to the steps or the static value, as options say.

    ``features`` [K, d] are what the net is given at the observed steps.
    """
    last = net[-1]
    assert isinstance(last, nn.Linear)
    with torch.no_grad():
        last.bias.copy_(inverse_softplus(observed.static.scale))
    choice = observed.options.start
    if choice != "as-is":
        _fit(net, features, observed.steps.scale if choice == "steps" else observed.static.scale.expand(len(features)))


def _fit(net: nn.Sequential, features: Tensor, target: Tensor) -> None:
    """Least squares of log s over the observed steps, by L-BFGS without dropout.

    Raises :class:`NonFiniteError` where it diverges, as it may for features as large as the raw time step.
    """
    net.eval()
    optimizer = torch.optim.LBFGS(net.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (scale_of(net, features).log() - target.log()).square().mean()
        loss.backward()
        return loss

    try:
        with torch.enable_grad():
            optimizer.step(closure)
    except RuntimeError as error:  # torch takes no step of infinite length
        raise NonFiniteError(DIVERGED) from error
    if not bool(torch.isfinite(scale_of(net, features)).all()):
        raise NonFiniteError(DIVERGED)
    net.train()


class ModuleInterval(IntervalSource):
    """``scale = softplus(net(encode(t)))``; the net's last layer is a linear layer to one number."""

    def __init__(self, encode: nn.Module, net: nn.Sequential, zero_point: Tensor) -> None:
        super().__init__()
        self.encode, self.net = encode, net
        self.register_buffer("zero_point", zero_point)
        self.zero_point: Tensor

    def forward(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return scale_of(self.net, self.encode(t)), lookup(self.zero_point, t)

    def start(self, observed: Observed) -> None:
        """Begin where the options say."""
        start(self.net, self.encode(observed.t), observed)
