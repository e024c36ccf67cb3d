"""PTQD's correction of a quantized model's predictions (arXiv 2305.10657): what of their error is not noise.

At each t the prediction is modelled as eps_hat = (1 + k) eps + d: k is a gain common to all values, d has a mean mu for
each channel and a variance. Mean and gain repeat at every step and add up along a trajectory, and both can be undone:

    eps ~ (eps_hat - mu_t) / (1 + max(k_t, 0))

What remains is noise of variance / (1 + k)^2; a sampler that adds noise of its own adds that much less.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ptq_tdq.calls import bind, prediction, tensors_of
from ptq_tdq.modules.delegating import Delegating
from ptq_tdq.timeaxis import TimeAxis, between
from ptq_tdq.timed_model import TimedModel

Call = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Correction:
    """At K observed time steps, float64: ``t`` [K] ascending, gain ``k`` [K], mean ``mu`` [K, C], ``variance`` [K]."""

    t: Tensor
    k: Tensor
    mu: Tensor
    variance: Tensor

    @property
    def gain(self) -> Tensor:
        """What a prediction is divided by [K]: 1 + max(k, 0); a gain below 1 is left alone, as PTQD does."""
        return 1 + self.k.clamp(min=0)

    @property
    def remaining_variance(self) -> Tensor:
        """Variance of the error after the correction [K]."""
        return self.variance / self.gain**2

    def at(self, values: Tensor, t: Tensor) -> Tensor:
        """Rows of ``values`` [K, ...] at t [B]: linear between observed steps, constant beyond."""
        return between(values, self.t, t)

    def apply(self, prediction: Tensor, t: Tensor) -> Tensor:
        """The corrected prediction of the same shape [B, C, ...] and dtype, at t [B]."""
        spatial = (1,) * (prediction.ndim - 2)
        mu, gain = self.at(self.mu, t).view(len(t), -1, *spatial), self.at(self.gain, t).view(-1, 1, *spatial)
        device = prediction.device
        return ((prediction - mu.to(device)) / gain.to(device)).to(prediction.dtype)


def fit_correction(calls: Iterable[Call]) -> Correction:
    """Least squares over pairs of predictions: t [B], full precision and quantized [B, C, ...] in each call.

    Sums are kept for each t, so any number of calls fits in memory.
    """
    sums: dict[float, Tensor] = {}  # by t: [6, C] of 1, f, e, ff, fe, ee
    for t, full, quantized in calls:
        f, e = full.double(), quantized.double() - full.double()
        parts = torch.stack([torch.ones_like(f), f, e, f * f, f * e, e * e]).flatten(3).sum(3)  # [6, B, C]
        for row, value in enumerate(t.tolist()):
            sums[value] = sums.get(value, torch.zeros(())) + parts[:, row]
    if not sums:
        raise ValueError("The 'calls' parameter of fit_correction must hold at least one call. Got none instead.")
    times = sorted(sums)
    n, f, e, ff, fe, ee = torch.stack([sums[value] for value in times], 1)  # [K, C] each
    within_ff, within_fe, within_ee = (a - b * c / n for a, b, c in ((ff, f, f), (fe, f, e), (ee, e, e)))
    spread = within_ff.sum(1)
    k = torch.where(spread > 0, within_fe.sum(1) / spread.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
    mu = (e - k[:, None] * f) / n
    residual = within_ee.sum(1) - 2 * k * within_fe.sum(1) + k * k * spread
    return Correction(torch.tensor(times, dtype=torch.float64), k, mu, residual.clamp(min=0) / n.sum(1))


class Corrected(Delegating):
    """A denoiser whose prediction is corrected; call signature and attributes are those of the ``model`` inside.

    ``axis`` says how the model's own time argument becomes t.
    """

    def __init__(self, model: nn.Module, correction: Correction, axis: TimeAxis) -> None:
        super().__init__()
        self.model, self.correction, self.axis = model, correction, axis

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.model(*args, **kwargs)
        named = self.model.model if isinstance(self.model, TimedModel) else self.model  # has the parameters' names
        predicted = prediction(output)
        t = self.axis.t(bind(named, args, kwargs).get(self.axis.argument)).cpu().expand(len(predicted))
        return _with_prediction(output, self.correction.apply(predicted, t))

    def lower_noise(self, schedule: Any) -> None:
        """Let the ``step`` of a DDIM schedule add less noise, where eta > 0, by what the prediction's error adds.

        Other schedules stay as they are. The error is taken as that of one prediction: with guidance there are two.
        """
        step = schedule.step
        form = inspect.signature(step)
        if not {"eta", "variance_noise", "generator"} <= set(form.parameters):
            return

        @functools.wraps(step)
        def lowered(*args: Any, **kwargs: Any) -> Any:
            given = form.bind(*args, **kwargs)
            given.apply_defaults()
            found = given.arguments
            if not found["eta"]:
                return step(*args, **kwargs)
            x, generator = found["sample"], found["generator"]
            noise = found["variance_noise"]
            if noise is None:
                noise = _normal(x, generator)
            share = self._share(schedule, int(found["timestep"]), found["eta"])
            found |= {"variance_noise": noise * share.to(x), "generator": None}
            return step(*given.args, **given.kwargs)

        schedule.step = lowered

    def _share(self, schedule: Any, t: int, eta: float) -> Tensor:
        """What the sampler's noise at ``t`` is multiplied by, a scalar."""
        before_t = t - schedule.config.num_train_timesteps // schedule.num_inference_steps
        alphas = schedule.alphas_cumprod.double().cpu()
        alpha, before = alphas[t], alphas[before_t] if before_t >= 0 else schedule.final_alpha_cumprod.double().cpu()
        sampler = eta**2 * (1 - before) / (1 - alpha) * (1 - alpha / before)
        of_noise = {"epsilon": torch.ones(()), "v_prediction": alpha.sqrt(), "sample": -(alpha / (1 - alpha)).sqrt()}
        coefficient = ddim_coefficient(alpha, before, sampler) * of_noise[schedule.config.prediction_type]
        remaining = self.correction.at(self.correction.remaining_variance, torch.tensor([t]))[0]
        share: Tensor = (lowered_variance(sampler, coefficient, remaining) / sampler.clamp(min=1e-30)).sqrt()
        return share


def _with_prediction(output: Any, predicted: Tensor) -> Any:
    """A denoiser's output, whatever its form, with another prediction [B, ...] in it."""
    kind = type(output)
    if is_dataclass(kind) and not issubclass(kind, dict):  # a tree knows diffusers' own alone
        name = next(f.name for f in fields(output) if any(x.ndim for x in tensors_of(getattr(output, f.name))))
        return replace(output, **{name: _with_prediction(getattr(output, name), predicted)})
    leaves, form = pytree.tree_flatten(output)
    first = next(i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.ndim)
    one = leaves[first].ndim == predicted.ndim
    rows = [predicted] if one else list(predicted)  # a list with one tensor per row
    leaves[first : first + len(rows)] = rows
    return pytree.tree_unflatten(leaves, form)


def _normal(x: Tensor, generator: Any) -> Tensor:
    """Standard normal noise in the form of ``x`` [B, ...], as diffusers draws it: from one generator or one per row."""
    if not isinstance(generator, list):
        device = x.device if generator is None else generator.device
        return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=device).to(x.device)
    return torch.cat([_normal(row[None], own) for row, own in zip(x, generator, strict=True)])


def lowered_variance(sampler: Tensor, coefficient: Tensor, remaining: Tensor) -> Tensor:
    """The variance that a sampler should add itself: ``sampler - coefficient^2 remaining``, never below 0.

    ``coefficient`` is that of the predicted noise in the sampler's update of x, ``remaining`` the variance of the
    prediction's error after the correction; all broadcast.
    """
    return (sampler - coefficient.square() * remaining).clamp(min=0)


def ddim_coefficient(alpha: Tensor, alpha_before: Tensor, sampler_variance: Tensor) -> Tensor:
    """The coefficient of the predicted noise in DDIM's update (arXiv 2010.02502, equation 12).

    ``alpha`` and ``alpha_before`` are the cumulative products at t and at the step that follows in sampling order.
    """
    direction = (1 - alpha_before - sampler_variance).clamp(min=0).sqrt()
    return direction - (alpha_before * (1 - alpha) / alpha).sqrt()
