"""What models are trained to predict, against diffusers' own schedulers; and which samples are drawn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from recorded import images
from small_denoiser import SmallDenoiser
from torch import Tensor

from ptq_tdq import Calls, record
from ptq_tdq.calls import prediction
from ptq_tdq.finetuning.data import NoisedSamples, RecordedCalls
from ptq_tdq.timeaxis import TimeAxis

NAMES = ("sample", "timestep", "class_labels")
CLEAN = images(48, channels=3, size=4, seed=2)


def noised(axis: TimeAxis, **options: Any) -> NoisedSamples:
    return NoisedSamples(CLEAN, torch.arange(48) % 5, axis, NAMES, **{"denoise": True, **options})


@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction", "sample"])
def test_diffusion_is_that_of_the_scheduler(predicts: str) -> None:
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", prediction_type=predicts)
    data = noised(TimeAxis("timestep"), alphas=scheduler.alphas_cumprod, predicts=predicts)
    (batch,) = data.draw(torch.arange(16), slice(None), torch.Generator().manual_seed(0))
    t, x0 = batch.arguments["timestep"].long(), CLEAN[data.rows[:16]]
    a = scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    noise = (batch.arguments["sample"] - a.sqrt() * x0) / (1 - a).sqrt()
    expected = {"epsilon": noise, "v_prediction": scheduler.get_velocity(x0, noise, t), "sample": x0}[predicts]
    torch.testing.assert_close(batch.target, expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(batch.arguments["sample"], scheduler.add_noise(x0, noise, t), rtol=1e-4, atol=1e-4)
    assert abs(float(noise.mean())) < 0.1 and abs(float(noise.std()) - 1) < 0.1
    assert torch.equal(batch.arguments["class_labels"], data.rows[:16] % 5)


def test_flow_matching_is_that_of_the_scheduler() -> None:
    """x_t and the velocity in which the scheduler's own step ends at x0; the model is given sigma."""
    data = noised(TimeAxis("timestep", 1000, scale=1000.0), alphas=None, predicts="flow")
    (batch,) = data.draw(torch.arange(16), slice(None), torch.Generator().manual_seed(0))
    sigma, x0 = batch.arguments["timestep"].view(-1, 1, 1, 1), CLEAN[data.rows[:16]]
    assert bool(((sigma >= 0) & (sigma <= 1)).all())
    torch.testing.assert_close(batch.arguments["sample"] - sigma * batch.target, x0)
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(10)
    t, noise = scheduler.timesteps[3:4], batch.target + x0
    torch.testing.assert_close(scheduler.scale_noise(x0, t, noise), x0 + t / 1000 * batch.target, rtol=1e-4, atol=1e-4)


def test_a_sample_is_the_same_however_many_processes_draw_it() -> None:
    data = noised(TimeAxis("timestep"), alphas=None, predicts="flow")
    numbers = data.order(3, 12, seed=1)
    (whole,) = data.draw(numbers, slice(None), torch.Generator().manual_seed(5))
    for start in range(0, 12, 4):
        (part,) = data.draw(numbers, slice(start, start + 4), torch.Generator().manual_seed(5))
        for name, value in part.arguments.items():
            assert torch.equal(value, whole.arguments[name][start : start + 4])


def test_samples_that_judge_are_not_learned_from(calls: Calls) -> None:
    data = noised(TimeAxis("timestep"), alphas=None, predicts="flow", denoise=False)
    assert data.count == 42 and sum(batch.rows for batch in data.judges()) == 6
    assert not set(data.rows.tolist()) & {7, 15, 23, 31, 39, 47}
    assert all(batch.target is None for batch in data.judges())
    recorded = RecordedCalls(calls)
    learned = set(calls.trajectory[recorded.rows].tolist())
    assert len(learned) == 112 and sum(batch.rows for batch in recorded.judges()) == 48  # one trajectory in eight


def test_what_is_remembered_is_what_full_precision_predicts(denoiser: SmallDenoiser, calls: Calls) -> None:
    """Of rows in any order, from a teacher that is called once for each."""
    data, rows = RecordedCalls(calls), list[int]()

    def predict(**arguments: Tensor) -> Tensor:
        rows.append(len(arguments["timestep"]))
        with torch.no_grad():
            return prediction(denoiser(**arguments))

    data.remember(predict)
    assert sum(rows) == len(calls)
    drawn = data.draw(data.order(2, 12, seed=0), slice(4, 9), torch.Generator())
    assert sum(batch.rows for batch in drawn) == 5
    for batch in (*drawn, *data.judges()):
        assert batch.target is not None
        torch.testing.assert_close(batch.target, predict(**batch.arguments), rtol=1e-5, atol=1e-6)


def test_each_sample_is_seen_once_an_epoch(calls: Calls) -> None:
    data = RecordedCalls(calls)
    seen = torch.cat([data.order(i, 16, seed=3) for i in range(data.count)])
    for epoch in seen.split(data.count):
        assert torch.equal(epoch.sort().values, torch.arange(data.count))
    assert not torch.equal(*(seen.split(data.count)[:2]))


def test_trajectories_that_judge_visit_every_step(denoiser: SmallDenoiser) -> None:
    """Thinned trajectories give every eighth of their steps, in turn."""
    with record(denoiser) as recorded, torch.no_grad():
        for t in range(8):
            denoiser(images(64), torch.full((64,), float(t)))
    thinned = recorded.select((recorded.trajectory % 8 == recorded.t.long()).nonzero().flatten())
    data = RecordedCalls(thinned)
    judging = torch.cat([batch.arguments["timestep"] for batch in data.judges()])
    assert sorted(judging.tolist()) == list(range(8)) and data.count == 56


def test_each_call_that_judges_has_time_steps_of_the_whole_run(denoiser: SmallDenoiser) -> None:
    """As the first of them say where intervals begin."""
    with record(denoiser) as recorded, torch.no_grad():
        for t in reversed(range(25)):
            denoiser(images(64), torch.full((64,), 40.0 * t))
    spans = [batch.arguments["timestep"] for batch in RecordedCalls(recorded).judges()]
    assert len(spans) > 4 and all(t.min() < 200 and t.max() > 760 for t in spans)
