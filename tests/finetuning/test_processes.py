"""Two processes learn what one does."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_denoiser import SmallDenoiser

from ptq_tdq import Calls, FinetuneConfig, QuantizedModel, finetune
from ptq_tdq.artifacts import read_artifact
from ptq_tdq.errors import ConfigError
from ptq_tdq.finetuning import processes

SHARED = Path(__file__).parents[1] / "shared"
LEARN = """
import json, sys, torch
from small_denoiser import SmallDenoiser
from ptq_tdq import Calls, FinetuneConfig, finetune
from ptq_tdq.finetuning import processes

torch.set_num_threads(1)
folder = sys.argv[1]
model = SmallDenoiser().eval().requires_grad_(False)
model.load_state_dict(torch.load(f"{folder}/model.pt"))
processes.join("cpu")
config, calls = FinetuneConfig(**json.loads(sys.argv[2])), Calls.load(f"{folder}/calls.safetensors")
tuned = finetune(model, f"{folder}/calibrated", config, calls)
if processes.rank() == 0:
    tuned.save_pretrained(f"{folder}/tuned")
processes.leave()
"""


def test_two_processes_learn_what_one_does(
    denoiser: SmallDenoiser,
    calls: Calls,
    calibrated: Callable[..., QuantizedModel],
    choose: Callable[..., FinetuneConfig],
    tmp_path: Path,
) -> None:
    """By the gloo backend, as torchrun starts them; to the digits that another order of sums leaves."""
    torch.save(denoiser.state_dict(), tmp_path / "model.pt")
    calls.save(tmp_path / "calls.safetensors")
    calibrated().save_pretrained(tmp_path / "calibrated")
    config = choose(iterations=5, accumulation=2, quantizer="pact")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHONPATH": str(SHARED)}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", LEARN, str(tmp_path), json.dumps(config.to_dict())],
            env={**os.environ, **shared, "RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=600)[1] for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [0, 0], errors
    one, two = finetune(denoiser, calibrated(), config, calls).to_artifact(), read_artifact(tmp_path / "tuned")
    losses = [[x["loss"] for x in found.metrics["finetune"]["losses"]] for found in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    for name, scale in one.weight_scale.items():
        torch.testing.assert_close(two.weight_scale[name], scale, rtol=1e-4, atol=1e-6)


def test_a_batch_that_processes_cannot_share_is_one_sentence(
    denoiser: SmallDenoiser, calls: Calls, calibrated: Callable[..., QuantizedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "count", lambda: 3)
    with pytest.raises(ConfigError, match=r"batch_size must be a multiple .* \(3\). Got 32 instead"):
        finetune(denoiser, calibrated(), FinetuneConfig(), calls)
