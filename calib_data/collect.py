"""Collect a calibration set: sample in full precision and keep the denoiser's calls at chosen steps."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ptq_tdq.atomic import check_folder
from ptq_tdq.cache import cache_folder
from ptq_tdq.calib_data.finite import finite_outputs
from ptq_tdq.calib_data.original import LoadedModel
from ptq_tdq.calib_data.sampler import Sampler, new_schedule, sample_generator
from ptq_tdq.calib_data.steps import StepDistribution, choose_steps
from ptq_tdq.calls import Calls, Recorder
from ptq_tdq.errors import CalibrationSetError, ConfigError
from ptq_tdq.files import holding
from ptq_tdq.identity import dtype_name, scheduler_config
from ptq_tdq.timeaxis import TimeAxis, find_axis

PURPOSE = "calibration"  # of the noise
CACHED = 3  # the form of what the cache holds; raised when what the cache holds changes
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Request:
    """What :func:`collect` is asked for. Raises :class:`ConfigError` for the impossible."""

    samples_per_step: int
    calibration_steps: int
    num_inference_steps: int
    step_distribution: StepDistribution = "uniform"
    thinning: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("samples_per_step", "calibration_steps", "num_inference_steps", "thinning"):
            _check_count(name, getattr(self, name))
        if self.calibration_steps > self.num_inference_steps:
            raise ConfigError(
                f"The {self.calibration_steps} calibration steps must be among the {self.num_inference_steps} "
                "inference steps; ask for fewer calibration steps or more inference steps."
            )
        object.__setattr__(self, "thinning", min(self.thinning, self.calibration_steps))


def collect(
    model: LoadedModel,
    *,
    samples_per_step: int,
    calibration_steps: int,
    num_inference_steps: int,
    step_distribution: StepDistribution = "uniform",
    thinning: int = 1,
    seed: int = 0,
    batch_size: int | None = None,
    parts: Path | None = None,
    on_progress: Progress | None = None,
) -> Calls:
    """Sample trajectories and keep the calls at ``calibration_steps`` steps, of ``samples_per_step`` of them at each.

    Steps of one trajectory are alike. With ``thinning`` n there are n times ``samples_per_step`` trajectories, each of
    which gives every n-th of its steps (and no more than can give one): as many rows, which are less alike.

    The set holds samples_per_step x calibration_steps rows (Q-Diffusion: 256 x 20 = 5120), or twice as many where
    guidance calls the denoiser with and without the condition. Trajectory i has the noise of (seed, i) alone, so
    ``batch_size`` (by default the sampler's own) changes speed and memory but not the result, apart from rounding in
    the last digits. Finished batches are kept in the folder ``parts``, if there is one, and read from it.

    ``on_progress(done, total)`` counts steps of the sampler.

    Raises :class:`ConfigError` for an impossible request, and :class:`~ptq_tdq.errors.NonFiniteError` naming t when
    the denoiser gives NaN or Inf.
    """
    size = model.sampler.batch if batch_size is None else batch_size
    _check_count("batch_size", size)
    asked = Request(
        samples_per_step=samples_per_step,
        calibration_steps=calibration_steps,
        num_inference_steps=num_inference_steps,
        step_distribution=step_distribution,
        thinning=thinning,
        seed=seed,
    )
    count = samples_per_step * asked.thinning
    conditions = drawn(model.sampler, count, seed)
    batches = [range(start, min(start + size, count)) for start in range(0, count, size)]
    collected, heard = [], None
    for number, samples in enumerate(batches):
        part = _read(parts, samples)
        if part is None:

            def stepped(step: int, done: int = number * num_inference_steps) -> None:
                if on_progress is not None:
                    on_progress(done + min(step + 1, num_inference_steps), len(batches) * num_inference_steps)

            part, heard = _sampled(model, asked, samples, conditions[samples.start : samples.stop], stepped, heard)
            if parts is not None:
                part.save(_file(parts, samples))
        collected.append(part)
    return Calls.join(collected, collected[0].axis, make_recipe(model, **vars(asked)))


def _sampled(
    model: LoadedModel,
    asked: Request,
    samples: range,
    conditions: list[Any],
    on_step: Callable[[int], None],
    heard: Sequence[float] | None = None,
) -> tuple[Calls, Sequence[float] | None]:
    """The calls of the trajectories ``samples``, which run at once.

    Steps are chosen from the schedule, or from those that were ``heard``. Where the sampler makes other ones than it
    lists, the run is made again with those, which are given back for the next.
    """
    recorder, schedule = Recorder(model.denoiser), new_schedule(model.sampler)
    choices = [sample_generator("steps", asked.seed, i) for i in samples]
    given = [slice(-i % asked.thinning, None, asked.thinning) for i in samples]
    wanted = _Wanted(schedule, asked.calibration_steps, asked.step_distribution, choices, given, heard)
    recorder.begin(samples.start, len(samples), wanted, on_step)
    with recorder.listening(), finite_outputs(model.denoiser):
        model.sampler.run(
            model.denoiser,
            conditions,
            [sample_generator(PURPOSE, asked.seed, i) for i in samples],
            asked.num_inference_steps,
            schedule,
        )
    if heard is None and not wanted.fit:
        return _sampled(model, asked, samples, conditions, on_step, recorder.steps)
    return recorder.calls(axis_of(recorder, schedule)), heard


def drawn(sampler: Sampler, count: int, seed: int) -> list[Any]:
    """Conditions of ``count`` trajectories: each round of all that there are is in an order of its own, by ``seed``.

    So few trajectories see different classes with each seed, and every part of many sees all alike.
    """
    known = sampler.conditions(sampler.num_conditions)
    orders: list[int] = []
    while len(orders) < count:
        generator = sample_generator("conditions", seed, len(orders))
        orders += torch.randperm(len(known), generator=generator).tolist()
    return [known[i] for i in orders[:count]]


class _Enough(BaseException):
    """Ends a run whose first call is all that is wanted; no pipeline takes it for an error of its own."""


def first_call(model: LoadedModel, num_inference_steps: int, seed: int = 0) -> Calls:
    """The first call that sampling makes of the denoiser, for one sample: what it is given, at the price of one call.

    Raises what the sampler and the denoiser refuse.
    """
    recorder, schedule = Recorder(model.denoiser), new_schedule(model.sampler)

    def stop(module: Any, args: Any, output: Any) -> None:
        if len(recorder.calls(TimeAxis(recorder.argument))):  # the recorder calls the denoiser, too, to look at it
            raise _Enough

    recorder.begin(0, 1)
    with recorder.listening(), suppress(_Enough), model.denoiser.register_forward_hook(stop):
        model.sampler.run(
            model.denoiser,
            model.sampler.conditions(1),
            [sample_generator(PURPOSE, seed, 0)],
            num_inference_steps,
            schedule,
        )
    return recorder.calls(axis_of(recorder, schedule))


def axis_of(recorder: Recorder, schedule: Any) -> TimeAxis:
    """The time axis of a model, from what it was called with and the schedule of the same run."""
    return _axis_of(schedule, recorder.argument, recorder.seen)


def _axis_of(schedule: Any, argument: str, seen: Collection[float]) -> TimeAxis:
    total = getattr(schedule.config, "num_train_timesteps", None)
    steps = [float(t) for t in schedule.timesteps]
    try:
        longer = copy.deepcopy(schedule)
        longer.set_timesteps(total)
        reach = [float(t) for t in longer.timesteps]
    except Exception:  # of any type: it has no such number, runs fewer steps, or needs more than their number
        reach = []
    return find_axis(argument, seen, steps, total, reach)


def make_recipe(model: LoadedModel, **asked: Any) -> dict[str, Any]:
    """Name all that a calibration set depends on, as plain JSON values; ``asked`` is a :class:`Request`."""
    scheduler = json.dumps(scheduler_config(model.scheduler), sort_keys=True, default=str)
    return {
        "model_sha256": model.sha256,
        "dtype": dtype_name(model.denoiser.dtype),
        "scheduler": type(model.scheduler).__name__,
        "scheduler_sha256": hashlib.sha256(scheduler.encode()).hexdigest(),
        **vars(Request(**asked)),
        "conditions": "drawn",  # all in turn, each round in an order of its own
        **model.sampler.recipe(),
    }


def collect_cached(
    model: LoadedModel,
    cache_dir: str | Path | None = None,
    *,
    batch_size: int | None = None,
    on_progress: Progress | None = None,
    **recipe: Any,
) -> Calls:
    """Do what :func:`collect` does, or read its result from ``cache_dir`` when model and recipe are unchanged.

    ``recipe`` are the other arguments of :func:`collect`. A damaged file in the cache is collected again and replaced;
    a collection that was interrupted goes on after its last batch.
    Raises what :func:`collect` raises, and :class:`~ptq_tdq.errors.OutputError` for a cache that cannot be written.
    """
    wanted = make_recipe(model, **recipe)
    name = hashlib.sha256(json.dumps([CACHED, wanted], sort_keys=True).encode()).hexdigest()[:32]
    path = (cache_folder() if cache_dir is None else Path(cache_dir)) / f"calls-{name}.safetensors"
    try:
        cached = Calls.load(path)
        if cached.recipe == wanted:
            return cached
    except CalibrationSetError:
        pass  # absent or damaged: a cache mends itself
    parts = path.with_suffix(".parts")
    check_folder(parts)
    with holding(parts) as held:
        alone = held is not False and parts.exists()  # another run may be collecting the same, or just have finished
        kept = parts if alone else None
        collected = collect(model, batch_size=batch_size, parts=kept, on_progress=on_progress, **recipe)
        collected.save(path)
        if alone:
            shutil.rmtree(parts, ignore_errors=True)
    return collected


class _Wanted:
    """Chooses steps for every sample once the sampler has set its schedule: when it first calls the denoiser."""

    def __init__(
        self,
        schedule: Any,
        count: int,
        distribution: StepDistribution,
        generators: Sequence[torch.Generator],
        given: Sequence[slice],
        heard: Sequence[float] | None = None,
    ) -> None:
        """``given`` are those of its chosen steps that a sample gives.

        ``heard`` are the times of the denoiser's own steps, where those are known from a run.
        """
        self.schedule, self.count, self.distribution = schedule, count, distribution
        self.generators, self.given, self.heard = generators, given, heard
        self.chosen = torch.empty(0, dtype=torch.bool)
        self.place = torch.empty(0)
        self._made: set[int] = set()

    def __call__(self, step: int) -> Tensor:
        """Step index of the denoiser's own calls -> bool [B]."""
        if not len(self.chosen):
            self._choose()
        # a pipeline with two denoisers calls each at a part of its steps; most schedules know where they are
        known = getattr(self.schedule, "step_index", None) if self.heard is None else None
        listed = known is not None and known < len(self.place)  # a sampler may go on by a longer schedule (FreeInit)
        index = int(self.place[known]) if listed else step
        self._made.add(index)
        if index < len(self.chosen):
            return self.chosen[index]
        return torch.zeros(len(self.generators), dtype=torch.bool)

    @property
    def fit(self) -> bool:
        """Whether the run that has ended made all steps of the schedule, or some of them where all are chosen."""
        listed = set(range(len(self.chosen)))
        return self._made == listed or (self._made < listed and self.count >= len(listed))

    def _choose(self) -> None:
        """Mark (step, sample) pairs, bool [steps, B]; all steps where there are fewer than asked for."""
        t = torch.as_tensor([float(t) for t in (self.schedule.timesteps if self.heard is None else self.heard)])
        steps, self.place = t.unique_consecutive(return_inverse=True)
        axis = _axis_of(self.schedule, "t", t.tolist())
        on_axis, total = steps * axis.scale + axis.offset, axis.num_train_timesteps
        self.chosen = torch.zeros(len(steps), len(self.generators), dtype=torch.bool)
        for column, (generator, given) in enumerate(zip(self.generators, self.given, strict=True)):
            found = choose_steps(
                on_axis, min(self.count, len(steps)), self.distribution, generator, num_train_timesteps=total
            )
            self.chosen[found[given], column] = True


def _file(parts: Path, samples: range) -> Path:
    return parts / f"{samples.start:06d}-{samples.stop:06d}.safetensors"


def _read(parts: Path | None, samples: range) -> Calls | None:
    if parts is None:
        return None
    try:
        return Calls.load(_file(parts, samples))
    except CalibrationSetError:
        return None


def _check_count(name: str, count: int) -> None:
    if count < 1:
        raise ConfigError(f"The '{name}' of a calibration set must be at least 1. Got {count} instead.")
