"""Phase W kept apart: runs that differ only in activations find the same weights there, and no others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ptq_tdq.calibration import calibrate
from ptq_tdq.config import preset
from ptq_tdq.errors import ResumeError
from ptq_tdq.recon import UnitReport

FEW = {"weight_iterations": 3, "activation_iterations": 3, "batch_size": 6, "weight_lr": 0.01}


def make(unet: Any, calls: Any, run: Path | None, weights: Path | None, **choices: Any) -> tuple[Any, list[Any]]:
    reports: list[UnitReport] = []
    config = preset("default", **{"scheme": "W4A8", "method": "static", **FEW, **choices})
    found = calibrate(unet, config, calls, run_directory=run, weights_directory=weights, on_unit=reports.append)
    return found, reports


def tensors(quantized: Any) -> dict[str, torch.Tensor]:
    artifact = quantized.to_artifact()
    tables = {f"{name}.s": t.scale for name, t in artifact.tables.items() if t.scale is not None}
    return {**tables, **artifact.weight_codes, **artifact.float_state}


@pytest.mark.parametrize(
    "other",
    [
        {"method": "tdq-thin"},
        {"scheme": "W4A6", "activation_iterations": 5, "rotate": "none"},
        {"method": "dynamic"},
        {"round_again": False},
    ],
)
def test_shared_weights_give_the_same_model_without_learning_them_again(
    unet: Any, calls: Any, tmp_path: Path, other: dict[str, Any]
) -> None:
    shared = tmp_path / "weights"
    make(unet, calls, tmp_path / "first", shared, rotate=other.get("rotate", "auto"))
    found, reports = make(unet, calls, tmp_path / "second", shared, **other)
    expected, _ = make(unet, calls, None, None, **other)
    assert all((r.seconds == 0) == (r.phase == "weights") for r in reports)
    mine, theirs = tensors(found), tensors(expected)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert not list((tmp_path / "second").glob("weights-*"))


@pytest.mark.parametrize(
    "other",
    [
        *({"scheme": "W3A8"}, {"weight_iterations": 4}, {"seed": 1}, {"bias_lr": 0.0}),
        *({"scheme": "W4A6"}, {"method": "dynamic-token"}),  # what is rotated depends on its inputs' intervals
    ],
)
def test_weights_of_other_choices_are_refused(unet: Any, calls: Any, tmp_path: Path, other: dict[str, Any]) -> None:
    make(unet, calls, tmp_path / "first", tmp_path / "weights")
    with pytest.raises(ResumeError, match="another choice"):
        make(unet, calls, tmp_path / "second", tmp_path / "weights", **other)
