"""What several processes refuse; that two learn what one does is tested where a user starts them (tests/e2e)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from small_denoiser import SmallDenoiser

from ptq_tdq import Calls, FinetuneConfig, QuantizedModel, processes
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
