"""What sources with a network share: an MLP whose softplus is the interval, and how it starts."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import expit
from threadpoolctl import ThreadpoolController
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
STEPS, DAMPING = 40, 1e-2  # of a fit, and how the first one is damped
NEAR, CLOSE = 3e-4, 1e-2  # root mean square distances of log s: a fit need not come below, and should
PRECISE = {"maxiter": 200, "maxcor": 50, "ftol": 1e-12, "gtol": 1e-8}
FAR = -30  # log softplus(x) is x from here

Array = NDArray[Any]
_one_at_a_time = Lock()  # or threads of ours would restore each other's limits of the libraries' threads


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
    """Ridge regression of log s on log ``target`` [K] at ``features`` [K, d], without dropout.

    ``ridge`` is the price of a squared distance of one of the net's weights from its start. By Levenberg's and
    Marquardt's method: with far more weights than points a step is the solution of K equations. Where that stays away
    from the target, as nets of one number do from curves that turn, L-BFGS goes its slower way from the start. In
    numpy, since so small a net takes torch's operators most of their time to be called.
    Raises :class:`NonFiniteError` where the net gives no numbers, as it may for features that are too large.
    """
    layers = [layer for layer in net if isinstance(layer, nn.Linear)]
    first = [np.column_stack([_array(layer.weight), _array(layer.bias)]) for layer in layers]
    offset, aim, x = _array(inverse_softplus(static.double())), _array(target.log()), _array(features)

    def at(moved: list[Array]) -> _Place:
        value, inputs, slopes = _forward(net, [a + b for a, b in zip(first, moved, strict=True)], x)
        value = value + offset
        scale, far = np.logaddexp(0, value), value < FAR
        off = np.where(far, value, np.log(scale)) - aim
        slope = np.where(far, 1, expit(value) / scale)
        loss = np.square(off).mean() + ridge * sum(np.square(m).sum() for m in moved)
        return _Place(moved, loss, off, inputs, [slope[:, None] * own for own in slopes])

    damping = DAMPING
    with np.errstate(all="ignore"), _one_at_a_time, _libraries().limit(limits=1, user_api="blas"):
        best = at([np.zeros_like(weights) for weights in first])
        for _ in range(STEPS):
            if np.square(best.off).mean() < NEAR**2:
                break
            found = at(_step(best, ridge, damping))
            better = found.loss < best.loss
            best, damping = (found, damping / 10) if better else (best, damping * 10)
        if not np.square(best.off).mean() < CLOSE**2:
            best = min(best, _by_gradients(at, best.moved, ridge), key=lambda place: place.loss)
    with torch.no_grad():
        for layer, start, move in zip(layers, first, best.moved, strict=True):
            weights = torch.from_numpy(start + move).to(features)
            layer.weight.copy_(weights[:, :-1])
            layer.bias.copy_(weights[:, -1])
    net.eval()
    if not np.isfinite(best.loss) or not bool(torch.isfinite(scale_of(net, features, static)).all()):
        raise NonFiniteError(DIVERGED)
    net.train()


@cache
def _libraries() -> ThreadpoolController:
    """What numpy and scipy compute with: threads of its own take such small matrices far longer on busy cores."""
    import scipy.optimize  # noqa: F401  # has one of its own

    return ThreadpoolController()


def _array(x: Tensor) -> Array:
    return x.detach().cpu().double().numpy()


class _Place(NamedTuple):
    """Where a fit is: by how much each layer's weights and biases [O, I + 1] are moved from their start, the loss, and
    the distances [K] of log s from its aim, whose gradients are products of each layer's ``slopes`` and ``inputs``.
    """

    moved: list[Array]
    loss: float
    off: Array
    inputs: list[Array]
    slopes: list[Array]


def _step(place: _Place, ridge: float, damping: float) -> list[Array]:
    """Where a fit goes next (``moved``): ridge regression, were the net linear in its weights.

    ``damping`` is the price of a squared distance from where it is.
    """
    total, points = ridge + damping, len(place.off)
    kept = damping / total  # of what was moved, for all that the points say
    layers = list(zip(place.moved, place.inputs, place.slopes, strict=True))
    linear = sum(((x @ m.T) * d).sum(1) for m, x, d in layers)
    gram = sum((d @ d.T) * (x @ x.T) for _, x, d in layers)
    shares = np.linalg.solve(gram + points * total * np.eye(points), place.off - (1 - kept) * linear)
    return [kept * m - (d * shares[:, None]).T @ x for m, x, d in layers]


def _by_gradients(at: Callable[[list[Array]], _Place], like: list[Array], ridge: float) -> _Place:
    """Where L-BFGS ends that begins where nothing is moved; ``like`` has the shapes."""
    from scipy.optimize import minimize

    ends = np.cumsum([m.size for m in like])

    def split(flat: Array) -> list[Array]:
        return [part.reshape(m.shape) for part, m in zip(np.split(flat, ends[:-1]), like, strict=True)]

    def loss(flat: Array) -> tuple[float, Array]:
        place = at(split(flat))
        layers = zip(place.moved, place.inputs, place.slopes, strict=True)
        of_off = place.off[:, None] / len(place.off)
        return place.loss, 2 * np.concatenate([((d * of_off).T @ x + ridge * m).ravel() for m, x, d in layers])

    return at(split(minimize(loss, np.zeros(ends[-1]), jac=True, method="L-BFGS-B", options=PRECISE).x))


def _forward(net: nn.Sequential, weights: list[Array], x: Array) -> tuple[Array, list[Array], list[Array]]:
    """What the net gives [K] with these weights and biases [O, I + 1] of its layers; for each layer the inputs
    [K, I + 1], with a one for the bias, and the net's gradients [K, O] with respect to its outputs.
    """
    inputs, bends = list[Array](), list[Array]()
    for layer in net:
        if isinstance(layer, nn.Linear):
            inputs.append(np.column_stack([x, np.ones(len(x))]))
            x = inputs[-1] @ weights[len(inputs) - 1].T
        elif not isinstance(layer, nn.Dropout):
            x, bend = BENDS[type(layer)](x)
            bends.append(bend)
    slopes = [np.ones_like(x)]
    for number in reversed(range(len(bends))):
        slopes.insert(0, slopes[0] @ weights[number + 1][:, :-1] * bends[number])
    return x[:, 0], inputs, slopes


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
