"""One sampling loop for every diffusers scheduler, and a recorder that listens to any such loop."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ptq_tdq.errors import ConfigError, NonFiniteError, UsageError


@dataclass(frozen=True)
class Record:
    """What one call of the U-Net received, for the trajectories that were asked for.

    ``rows`` int64 [n] are their positions in the batch, ``x`` [n, C, H, W] and ``t`` [n] float32, ``class_labels``
    int64 [n] or None.
    """

    step_index: int
    rows: Tensor
    x: Tensor
    t: Tensor
    class_labels: Tensor | None


class Recorder(nn.Module):
    """A U-Net that keeps copies of its inputs; outputs and all other attributes are those of the wrapped U-Net.

    ``wanted`` bool [steps, batch] chooses what to keep: row i belongs to the i-th call of the U-Net in a sampling run
    (the step index), a column to a position in the batch. None keeps everything. The copies are float32 on the CPU in
    :attr:`records`. A call after the last row raises :class:`UsageError`.
    """

    def __init__(self, unet: nn.Module, wanted: Tensor | None = None) -> None:
        super().__init__()
        self.unet = unet
        self.wanted = wanted
        self.calls = 0
        self.records: list[Record] = []

    def __getattr__(self, name: str) -> Any:  # pipelines read unet.config, unet.dtype and unet.device
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("unet"), name)

    def forward(
        self, sample: Tensor, timestep: Tensor | float, class_labels: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        rows = self._rows(len(sample))
        if len(rows):
            at = rows.to(sample.device)
            t = torch.as_tensor(timestep, dtype=torch.float32).flatten().cpu().expand(len(sample))
            labels = None if class_labels is None else class_labels[at].to("cpu", torch.int64)
            x = sample.detach()[at].to("cpu", torch.float32)
            self.records.append(Record(self.calls, rows, x, t[rows], labels))
        self.calls += 1
        if class_labels is not None:  # the dummy models of the field have no such argument
            kwargs["class_labels"] = class_labels
        return self.unet(sample, timestep, *args, **kwargs)

    def _rows(self, batch: int) -> Tensor:
        if self.wanted is None:
            return torch.arange(batch)
        if self.calls >= len(self.wanted):
            raise UsageError(
                f"The recorder expects a run of {len(self.wanted)} calls of the U-Net but was called once more; "
                "use a new recorder for each sampling run."
            )
        if self.wanted.shape[1] != batch:
            raise UsageError(
                f"The recorder expects a batch of {self.wanted.shape[1]} but got {batch}; make `wanted` fit the batch."
            )
        return self.wanted[self.calls].nonzero().flatten().cpu()


def start_schedule(scheduler: Any, num_inference_steps: int, device: torch.device | str = "cpu") -> Any:
    """A copy of a diffusers scheduler, set to ``num_inference_steps``; the original keeps its state.

    Raises :class:`ConfigError` for a number of steps that the scheduler cannot run, and for a scheduler that does not
    take one prediction of the U-Net per step.
    """
    _check_interface(scheduler)
    if num_inference_steps < 1:
        raise ConfigError(f"The number of inference steps must be at least 1. Got {num_inference_steps} instead.")
    schedule = copy.deepcopy(scheduler)
    try:
        schedule.set_timesteps(num_inference_steps, device=device)
    except ValueError as error:
        name = type(scheduler).__name__
        raise ConfigError(
            f"{name} cannot run {num_inference_steps} inference steps; choose another number ({error})."
        ) from error
    return schedule


def _check_interface(scheduler: Any) -> None:
    needed = ("init_noise_sigma", "scale_model_input", "set_timesteps", "step")
    missing = [name for name in needed if not hasattr(scheduler, name)]
    if not missing:
        parameters = list(inspect.signature(scheduler.step).parameters.values())
        named = [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
        missing = [] if named == ["model_output", "timestep", "sample"] else ["step(model_output, timestep, sample)"]
    if missing:
        raise ConfigError(
            f"{type(scheduler).__name__} does not sample with one prediction per step (it has no {missing[0]}); "
            "use one such as DDIMScheduler."
        )


@torch.no_grad()
def sample_latents(
    unet: nn.Module,
    scheduler: Any,
    *,
    noise: Tensor,
    num_inference_steps: int,
    class_labels: Tensor | None = None,
    generator: torch.Generator | list[torch.Generator] | None = None,
    eta: float = 0.0,
    on_step: Callable[[int, float, Tensor], None] | None = None,
) -> Tensor:
    """Run a sampler from standard normal ``noise`` [B, C, H, W] to the final latents of the same shape.

    ``scheduler`` is any diffusers scheduler; it is copied, so its state does not change. ``class_labels`` int64 [B] may
    mix classes. ``generator`` (one, or one per sample) feeds samplers that add noise, ``eta`` is DDIM's; both reach
    only schedulers whose ``step`` takes them. ``on_step(step_index, t, x)`` is called after each step with the new x.

    Raises :class:`NonFiniteError` naming t when the U-Net returns NaN or Inf, and :class:`ConfigError` for a number of
    steps that the scheduler cannot run.
    """
    schedule = start_schedule(scheduler, num_inference_steps, noise.device)
    accepted = inspect.signature(schedule.step).parameters
    options = {name: value for name, value in {"eta": eta, "generator": generator}.items() if name in accepted}
    labels = {} if class_labels is None else {"class_labels": class_labels}
    x: Tensor = noise * schedule.init_noise_sigma
    for index, t in enumerate(schedule.timesteps):
        scaled = schedule.scale_model_input(x, t)
        prediction = unet(scaled, t, return_dict=False, **labels)[0]
        if not torch.isfinite(prediction).all():
            layer = _first_non_finite(unet, scaled, t, labels)
            raise NonFiniteError(
                f"The U-Net returned NaN or Inf at time step t = {t.item():g} (step index {index}{layer}); "
                "check its weights and dtype."
            )
        x = schedule.step(prediction, t, x, return_dict=False, **options)[0]
        if on_step is not None:
            on_step(index, t.item(), x)
    return x


def _first_non_finite(unet: nn.Module, x: Tensor, t: Tensor, labels: dict[str, Tensor]) -> str:
    """Name the layer whose output was the first to have NaN or Inf, as a part of a sentence; empty if none had."""
    network = unet.unet if isinstance(unet, Recorder) else unet
    found: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not torch.isfinite(output).all():
                found.append(name)

        return hook

    leaves = [(name, m) for name, m in network.named_modules() if name and not any(m.children())]
    handles = [module.register_forward_hook(watch(name)) for name, module in leaves]
    try:
        network(x, t, return_dict=False, **labels)
    finally:
        for handle in handles:
            handle.remove()
    return f", first in {found[0]}" if found else ""
