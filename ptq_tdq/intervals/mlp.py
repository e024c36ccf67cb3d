"""What sources with a network share: an MLP whose softplus is the interval, and how it starts."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from ptq_tdq.errors import NonFiniteError
from ptq_tdq.intervals.base import IntervalSource, LearnedScale, Observed
from ptq_tdq.intervals.together import Together
from ptq_tdq.timeaxis import lookup

DIVERGED = (
    "A network of the time step diverges on the way to its first intervals; choose another time encoding, or "
    "module_start=as-is."
)
PLACES = 51  # of the axis, at which a module is fitted


def inverse_softplus(y: Tensor) -> Tensor:
    """x with softplus(x) = y, for y > 0; exact for small y, where log(exp(y) - 1) would lose all digits."""
    tiny = torch.finfo(torch.float32).tiny
    return torch.where(y < 1e-6, y.clamp(min=tiny).log(), y + torch.log(-torch.expm1(-y.clamp(min=1e-6))))


def scale_of(net: nn.Sequential, features: Tensor, static: Tensor) -> Tensor:
    """``softplus(net(features) + softplus^-1(static))`` [B] of ``features`` [B, d]: ``static`` where the net gives 0.

    Positive: softplus underflows to 0 for a very negative input.
    """
    value = net(features).squeeze(-1) + inverse_softplus(static)
    return functional.softplus(value).clamp(min=torch.finfo(torch.float32).tiny)


def centre(net: nn.Sequential, features: Tensor, *, silent: bool = False) -> None:
    """Set the last bias so that the net's mean over ``features`` [K, d] is 0; ``silent``: so that all it gives is 0."""
    last = net[-1]
    assert isinstance(last, nn.Linear)
    net.eval()
    with torch.no_grad():
        if silent:
            last.weight.zero_()
        last.bias.sub_(net(features).mean())
    net.train()


def fit(net: nn.Sequential, features: Tensor, static: Tensor, target: Tensor, ridge: float) -> None:
    """Ridge regression of log s on log ``target`` [K] at ``features`` [K, d], by L-BFGS without dropout.

    ``ridge`` is the price of a squared distance of one of the net's weights from its start.
    Raises :class:`NonFiniteError` where it diverges, as it may for features as large as the raw time step.
    """
    net.eval()
    optimizer = torch.optim.LBFGS(net.parameters(), max_iter=100, line_search_fn="strong_wolfe")
    first = [p.detach().clone() for p in net.parameters()]

    def closure() -> Tensor:
        optimizer.zero_grad()
        moved = torch.stack([(p - f).square().sum() for p, f in zip(net.parameters(), first, strict=True)]).sum()
        loss = (scale_of(net, features, static).log() - target.log()).square().mean() + ridge * moved
        loss.backward()
        return loss

    try:
        with torch.enable_grad():
            optimizer.step(closure)
    except RuntimeError as error:  # torch takes no step of infinite length
        raise NonFiniteError(DIVERGED) from error
    if not bool(torch.isfinite(scale_of(net, features, static)).all()):
        raise NonFiniteError(DIVERGED)
    net.train()


class ModuleInterval(IntervalSource):
    """``softplus(net(encode(t)) + softplus^-1(scale))``: what S_1 learns, and a net of t that is added to it.

    The net's last layer is a linear layer to one number. ``together`` computes many of one ``form`` at once.
    """

    together: Together | None

    def __init__(self, encode: nn.Module, net: nn.Sequential, observed: Observed) -> None:
        """Begin where the choices say."""
        super().__init__()
        self.encode, self.net, self.together = encode, net, None
        choices, static = observed.choices, observed.static
        self.scale = LearnedScale(static.scale, choices.interval_parameter)
        axis = torch.arange(observed.num_train_timesteps + 1)
        own = choices.zero_point == "own"
        self.register_buffer(
            "zero_point", observed.curve.zero_point if own else static.zero_point.expand(len(axis)).clone()
        )
        self.zero_point: Tensor
        centre(net, encode(axis), silent=choices.module_start == "static")
        if choices.module_start == "steps":
            places = torch.linspace(0, len(axis) - 1, PLACES).round().long()
            fit(net, encode(places), static.scale, observed.curve.scale[places], 1e-6)

    @property
    def form(self) -> str:
        """What it has in common with those that differ in their tensors' values alone."""
        return f"{self.net} {self.encode.kind} {self.scale.log} {len(self.zero_point)}"

    def forward(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.together is not None and (found := self.together.of(self, t)) is not None:
            return found
        return scale_of(self.net, self.encode(t), self.scale()), lookup(self.zero_point, t)
