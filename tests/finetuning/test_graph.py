"""Iterations as CUDA graphs: the losses of iterations that are launched kernel by kernel."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from small_denoiser import SmallDenoiser
from torch import Tensor

from ptq_tdq import Calls, FinetuneConfig, QuantizedModel, finetune
from ptq_tdq.errors import ConfigError, ModelError
from ptq_tdq.finetuning import IterationReport

Calibrated = Callable[..., QuantizedModel]
Choose = Callable[..., FinetuneConfig]
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


class Waiting(SmallDenoiser):
    """Asks the device for a number in each call, as some samplers' tricks do."""

    def forward(self, sample: Tensor, timestep: Tensor) -> Any:
        return super().forward(sample, timestep) if bool(sample.isfinite().any()) else sample


@on_a_gpu
@pytest.mark.parametrize(
    "choices",
    [
        {"quantizer": "lsq", "method": "tdq"},
        {"quantizer": "nipq", "method": "tdq-thin"},  # noise, and another step once it is frozen
        {"quantizer": "duq", "accumulation": 2},
    ],
    ids=str,
)
def test_losses_are_those_of_single_kernels(
    choices: dict[str, Any], denoiser: SmallDenoiser, calls: Calls, calibrated: Calibrated, choose: Choose
) -> None:
    losses: dict[bool, list[float]] = {}
    for graph in (False, True):
        found: list[float] = []

        def keep(report: IterationReport, found: list[float] = found) -> None:
            found.append(report.loss)

        config = choose(**choices, cuda_graph=graph, iterations=20)
        finetune(deepcopy(denoiser).cuda(), calibrated(), config, calls, on_iteration=keep)
        losses[graph] = found
    assert losses[True] == pytest.approx(losses[False], rel=0.02), "sums in another order flip a code here and there"
    assert losses[True][:3] == pytest.approx(losses[False][:3], rel=1e-4)


@on_a_gpu
def test_a_model_that_waits_for_the_device_is_one_sentence(
    calls: Calls, denoiser: SmallDenoiser, calibrated: Calibrated, choose: Choose
) -> None:
    waiting = Waiting().eval().requires_grad_(False)
    waiting.load_state_dict(denoiser.state_dict())
    with pytest.raises(ModelError, match=r"cannot be captured as a CUDA graph \(.*\); leave out cuda_graph"):
        finetune(waiting.cuda(), calibrated().to_artifact(), choose(cuda_graph=True), calls)


def test_a_model_on_the_cpu_is_one_sentence(
    calls: Calls, denoiser: SmallDenoiser, calibrated: Calibrated, choose: Choose
) -> None:
    with pytest.raises(ConfigError, match="cuda_graph is for a model on a GPU; move it there"):
        finetune(denoiser, calibrated(), choose(cuda_graph=True), calls)
