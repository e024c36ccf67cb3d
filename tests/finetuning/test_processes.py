"""What several processes refuse; that two learn what one does is tested where a user starts them (tests/e2e)."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import in_processes
from small_denoiser import SmallDenoiser

from ptq_tdq import Calls, FinetuneConfig, QuantizedModel, finetune, processes
from ptq_tdq.calib_data import find_original
from ptq_tdq.errors import ConfigError
from ptq_tdq.finetuning import check_start


def test_a_batch_that_processes_cannot_share_is_one_sentence(
    denoiser: SmallDenoiser, calls: Calls, calibrated: Callable[..., QuantizedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = calibrated()
    monkeypatch.setattr(processes, "count", lambda: 3)
    with pytest.raises(ConfigError, match=r"batch_size must be a multiple .* \(3\). Got 32 instead"):
        check_start(find_original(denoiser, recorded=True), artifact.to_artifact(), FinetuneConfig(), calls)


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked")
@pytest.mark.parametrize("key", ["choice weight_lr", "artifact", "data", "run_directory"])
def test_other_things_given_to_one_process_are_one_sentence(
    key: str,
    denoiser: SmallDenoiser,
    calls: Calls,
    calibrated: Callable[..., QuantizedModel],
    choose: Callable[..., FinetuneConfig],
    tmp_path: Path,
) -> None:
    given: dict[str, Any] = {"artifact": calibrated(), "config": choose(iterations=2), "data": calls}
    other = {
        "choice weight_lr": {"config": choose(iterations=2, weight_lr=1e-2)},
        "artifact": {"artifact": calibrated("W4A4")},
        "data": {"data": calls.select(torch.arange(300))},
        "run_directory": {"run_directory": tmp_path / "run"},
    }
    found = in_processes(2, tmp_path, lambda rank: finetune(denoiser, **given | (other[key] if rank else {})))
    assert {(type(error), str(error)) for error in found} == {
        (ConfigError, f"The processes of this run differ in their {key}; give the same to all of them.")
    }
