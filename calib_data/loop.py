"""The plain sampling loop: any diffusers scheduler around a denoiser of x, t and, at most, a class."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ptq_tdq.calib_data.sampler import Sampled, Sampler
from ptq_tdq.calls import main_argument_name, prediction
from ptq_tdq.calls.arguments import REFUSALS
from ptq_tdq.errors import ConfigError, ModelError, NonFiniteError, first_line
from ptq_tdq.timeaxis import time_argument

LABELS = "class_labels"
_CLASS_COUNTS = ("num_class_embeds", "num_embeds_ada_norm")  # entries of a configuration


class LoopSampler(Sampler):
    """Samples from standard normal noise by the scheduler's steps, and decodes with the VAE where there is one."""

    batch = 64

    def __init__(
        self,
        model: nn.Module,
        scheduler: Any,
        vae: Any | None = None,
        classes: Sequence[int] | None = None,
        num_classes: int | None = None,
        eta: float = 0.0,
    ) -> None:
        """``classes`` are those to sample; by default all, in turn: ``num_classes``, or as many as the model embeds.

        ``eta`` is DDIM's share of added noise.

        Raises :class:`ModelError` for a denoiser that needs more than x, t and a class.
        """
        self.scheduler, self.vae = scheduler, vae
        self.eta = eta
        _check_interface(scheduler)
        if isinstance(eta, bool) or not isinstance(eta, int | float) or not 0 <= eta <= 1:
            raise ConfigError(f"eta must be a number from 0 to 1. Got {eta!r} instead.")
        self.names = main_argument_name(model), time_argument(model)
        self.num_classes = _count_classes(model) if num_classes is None else num_classes
        self.shape = _shape_of_x(model)
        self.choose(classes)

    def recipe(self) -> dict[str, Any]:
        found: dict[str, Any] = {"sampler": "loop", "num_classes": self.num_classes, "classes": self.classes}
        return found | ({"call": {"eta": self.eta}} if self.eta else {})

    @torch.no_grad()
    def run(
        self,
        denoiser: nn.Module,
        conditions: Sequence[Any],
        generators: Sequence[torch.Generator],
        num_inference_steps: int,
        schedule: Any,
    ) -> Sampled:
        """As the base says. Raises :class:`ConfigError` for a number of steps that the scheduler cannot run."""
        device, dtype = getattr(denoiser, "device", torch.device("cpu")), getattr(denoiser, "dtype", torch.float32)
        start_schedule(schedule, num_inference_steps, device)
        try:
            noise = torch.stack([torch.randn(self.shape, generator=generator) for generator in generators])
        except RuntimeError as error:  # more than there is memory, or than torch can count
            raise ModelError(
                f"{len(generators)} samples of shape {list(self.shape)} cannot be made ({first_line(error)}); "
                "correct sample_size in the model's configuration."
            ) from error
        labels = {} if conditions[0] is None else {LABELS: torch.tensor(conditions, device=device)}
        channels = None if _reads_variance(schedule) else self.shape[0]
        latents = step_through(
            lambda x, t: self._predict(denoiser, x.to(dtype), t, labels)[:, :channels],
            noise.to(device),
            schedule,
            generators,
            self.eta,
        )
        latents = latents.float().cpu()
        return Sampled(latents, self._decode(latents))

    def _predict(self, denoiser: nn.Module, x: Tensor, t: Tensor, labels: dict[str, Tensor]) -> Tensor:
        main, time = self.names
        # a 0-dim t serves U-Nets, transformers of the field want one t per sample
        arguments = {main: x, time: t.expand(len(x)).to(x.device), **labels}
        try:
            return prediction(denoiser(**arguments)).float()
        except (ConfigError, ModelError, NonFiniteError):
            raise
        except REFUSALS as error:
            raise ModelError(
                f"{type(denoiser).__name__} cannot be called with x, t{' and a class' if labels else ''} alone "
                f"({first_line(error)}); pass the folder of its pipeline, or record calls of it."
            ) from error

    def _decode(self, latents: Tensor) -> Tensor | None:
        if latents.ndim != 4 or (self.vae is None and latents.shape[1] not in (1, 3)):
            return None
        if self.vae is None:
            return latents.clamp(-1, 1)
        scaled = latents.to(self.vae.device, self.vae.dtype) / self.vae.config.scaling_factor
        shift = getattr(self.vae.config, "shift_factor", None)
        decoded: Tensor = self.vae.decode(scaled + shift if shift else scaled).sample
        return decoded.float().clamp(-1, 1).cpu()


def step_through(
    predict: Callable[[Tensor, Tensor], Tensor],
    noise: Tensor,
    schedule: Any,
    generators: Sequence[torch.Generator] | None = None,
    eta: float = 0.0,
) -> Tensor:
    """From standard normal ``noise`` [B, ...] to the final x of the same shape, by the steps of ``schedule``.

    ``predict(x, t)`` is the denoiser, x scaled as the schedule wants it, t a scalar. x itself stays float32: steps are
    small. ``generators``, one per sample, feed schedules that add noise; DDIM does so for ``eta`` above 0.

    Raises :class:`ConfigError` for an ``eta`` that the schedule does not take, and for steps that it cannot do.
    """
    parameters = inspect.signature(schedule.step).parameters
    if eta and "eta" not in parameters:
        raise ConfigError(f"{type(schedule).__name__} has no eta; leave it out, or sample with DDIMScheduler.")
    options: dict[str, Any] = {"eta": eta} if eta else {}
    if generators is not None and "generator" in parameters:
        options["generator"] = list(generators)
    x = noise * getattr(schedule, "init_noise_sigma", 1.0)
    for t in schedule.timesteps:
        scaled = schedule.scale_model_input(x, t) if hasattr(schedule, "scale_model_input") else x
        predicted = predict(scaled, t)
        try:
            x = schedule.step(predicted, t, x, return_dict=False, **options)[0]
        except torch.OutOfMemoryError:
            raise
        except REFUSALS as error:
            raise ConfigError(
                f"{type(schedule).__name__} does not step from t = {float(t):g} by the model's prediction alone "
                f"({first_line(error)}); sample with another scheduler, or record calls of the model."
            ) from error
    return x


def _reads_variance(schedule: Any) -> bool:
    """Whether the scheduler's steps read a variance that the model predicts beside all else."""
    learned = str(getattr(getattr(schedule, "config", None), "variance_type", "")).startswith("learned")
    function = getattr(schedule, "_get_variance", None)
    return learned and function is not None and "predicted_variance" in inspect.signature(function).parameters


def start_schedule(schedule: Any, num_inference_steps: int, device: torch.device | str = "cpu") -> None:
    """Set a scheduler to ``num_inference_steps``; raises :class:`ConfigError` for what it cannot run."""
    if num_inference_steps < 1:
        raise ConfigError(f"The number of inference steps must be at least 1. Got {num_inference_steps} instead.")
    try:
        schedule.set_timesteps(num_inference_steps, device=device)
    except Exception as error:  # of any type: nobody has checked its configuration against their number
        raise ConfigError(
            f"{type(schedule).__name__} cannot run {num_inference_steps} inference steps; "
            f"choose another number or scheduler ({first_line(error)})."
        ) from error


def _check_interface(scheduler: Any) -> None:
    missing = [name for name in ("set_timesteps", "step") if not hasattr(scheduler, name)]
    if not missing:
        parameters = list(inspect.signature(scheduler.step).parameters.values())
        named = [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
        missing = [] if named == ["model_output", "timestep", "sample"] else ["step(model_output, timestep, sample)"]
    if missing:
        raise ConfigError(
            f"{type(scheduler).__name__} does not sample with one prediction per step (it has no {missing[0]}); "
            "use one such as DDIMScheduler."
        )


def _count_classes(model: nn.Module) -> int:
    if LABELS not in inspect.signature(model.forward).parameters:
        return 0
    config = getattr(model, "config", None)
    kind = getattr(config, "class_embed_type", None)
    if kind is not None:
        raise ModelError(
            f"Class embeddings of type '{kind}' take no class numbers; pass the folder of the model's pipeline, or "
            "record calls of it."
        )
    return next((int(n) for name in _CLASS_COUNTS if (n := getattr(config, name, None))), 0)


def _shape_of_x(model: nn.Module) -> tuple[int, ...]:
    """Channels and sizes of one sample, from the configuration and the dimensions of the first convolution."""
    config = getattr(model, "config", None)
    channels, size = getattr(config, "in_channels", None), getattr(config, "sample_size", None)
    first = next((m for m in model.modules() if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d)), None)
    dims = len(first.kernel_size) if first is not None else 2
    given = list(size) if isinstance(size, list | tuple) else [size] * dims
    sizes = [n for n in given if isinstance(n, int) and n > 0]
    if channels is None or not len(sizes) == len(given) == dims:
        raise ModelError(
            f"The configuration of {type(model).__name__} does not say the shape of its samples "
            "(in_channels, sample_size); pass the folder of its pipeline, or record calls of it."
        )
    return (int(channels), *sizes)
