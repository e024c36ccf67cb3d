"""Small pipelines, calibrated once for all tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from calibrated import QUICK, Calibrated, draw, load
from pipelines import PIPELINES

from ptq_tdq import calibrate


@pytest.fixture(scope="session")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Calibrated]:
    """The small pipeline of a name, calibrated when it is first asked for."""
    made: dict[str, Calibrated] = {}

    def make(name: str) -> Calibrated:
        if name not in made:
            (entry,) = (entry for entry in PIPELINES if entry.name == name)
            folder = tmp_path_factory.mktemp(name)
            entry.save(folder / "full")
            pipe = load(folder / "full")
            call = {
                key: value for key, value in entry.call.items() if key not in ("num_inference_steps", "output_type")
            }
            condition: dict[str, Any] = {"prompt": {"prompts": ["A red fox"] * 2}, "class_labels": {"classes": [1]}}
            quantized = calibrate(pipe, QUICK, call=call, **condition.get(entry.condition or "", {}))
            quantized.save_pretrained(folder / "artifact")
            setattr(pipe, entry.denoiser, quantized)
            made[name] = Calibrated(entry, folder / "full", folder / "artifact", draw(entry, pipe))
        return made[name]

    return make


@pytest.fixture
def stable_diffusion(calibrated: Callable[[str], Calibrated]) -> Calibrated:
    return calibrated("StableDiffusionPipeline")
