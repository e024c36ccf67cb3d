"""What sources with a network share: an MLP whose softplus is the interval, and how it starts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import expit
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from ptq_tdq.errors import NonFiniteError
from ptq_tdq.intervals.base import IntervalSource, LearnedScale, Observed
from ptq_tdq.intervals.together import Together
from ptq_tdq.timeaxis import lookup

DIVERGED = (
    "A network of the time step diverges on the way to its first intervals; choose another time encoding, or "
    "module_start=as-is."
)
PLACES = 51  # of the axis, at which a module is fitted
PRECISE = {"maxiter": 200, "maxcor": 50, "ftol": 1e-12, "gtol": 1e-8}

Array = NDArray[Any]


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

    ``ridge`` is the price of a squared distance of one of the net's weights from its start. In numpy, since so small a
    net takes torch's operators most of their time to be called.
    Raises :class:`NonFiniteError` where it diverges, as it may for features as large as the raw time step.
    """
    from scipy.optimize import minimize

    first = parameters_to_vector(net.parameters()).detach().cpu().double().numpy()
    offset, aim = (x.detach().cpu().double().numpy() for x in (inverse_softplus(static.double()), target.log()))
    x = features.detach().cpu().double().numpy()

    def loss(weights: Array) -> tuple[float, Array]:
        value, back = _forward(net, weights, x)
        scale = np.maximum(np.logaddexp(0, value + offset), np.finfo(np.float32).tiny)
        off, moved = np.log(scale) - aim, weights - first
        slope = 2 * off / len(off) * expit(value + offset) / scale
        return np.square(off).mean() + ridge * moved @ moved, back(slope) + 2 * ridge * moved

    with np.errstate(all="ignore"):
        found = minimize(loss, first, jac=True, method="L-BFGS-B", options=PRECISE)
    vector_to_parameters(torch.from_numpy(found.x).to(features), net.parameters())
    net.eval()
    if not bool(torch.isfinite(scale_of(net, features, static)).all()):
        raise NonFiniteError(DIVERGED)
    net.train()


def _forward(net: nn.Sequential, weights: Array, x: Array) -> tuple[Array, Callable[[Array], Array]]:
    """What the net gives [K] with these ``weights``, in the order of its parameters; and a function from the gradient
    of that [K] to that of the weights.
    """
    inputs, slopes, matrices, end = list[Array](), list[Array](), list[Array](), 0
    for layer in net:
        if isinstance(layer, nn.Linear):
            start, middle, end = end, end + layer.weight.numel(), end + layer.weight.numel() + layer.out_features
            matrices.append(weights[start:middle].reshape(layer.weight.shape))
            inputs.append(x)
            x = x @ matrices[-1].T + weights[middle:end]
        elif not isinstance(layer, nn.Dropout):
            x, slope = BENDS[type(layer)](x)
            slopes.append(slope)

    def back(gradient: Array) -> Array:
        found, of_output = list[Array](), gradient[:, None]
        for number in reversed(range(len(inputs))):
            found += [of_output.sum(0), (of_output.T @ inputs[number]).ravel()]
            if number:
                of_output = of_output @ matrices[number] * slopes[number - 1]
        return np.concatenate(found[::-1])

    return x[:, 0], back


def _silu(x: Array) -> tuple[Array, Array]:
    gate = expit(x)
    return x * gate, gate * (1 + x * (1 - gate))


def _tanh(x: Array) -> tuple[Array, Array]:
    y = np.tanh(x)
    return y, 1 - y * y


BENDS: dict[type[nn.Module], Callable[[Array], tuple[Array, Array]]] = {
    nn.ReLU: lambda x: (np.maximum(x, 0), (x > 0).astype(x.dtype)),
    nn.SiLU: _silu,
    nn.Tanh: _tanh,
}  # what activations give, and their slopes


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
