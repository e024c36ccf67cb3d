"""Evaluations of the embedded models and of one without a classifier."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from torch import nn

from ptq_tdq.calib_data import LoadedModel, load_model
from ptq_tdq.errors import MissingExtraError
from ptq_tdq.evaluate.baseline import CALLS, TENSORS, Baseline, load_baseline, make_baseline, save_baseline
from ptq_tdq.evaluate.names import METRICS

COUNT = 12
REQUEST: dict[str, Any] = {"samples": COUNT, "num_inference_steps": 2, "seed": 3}

Tiny = Callable[..., LoadedModel]
Scaled = Callable[[nn.Module, float], nn.Module]


@pytest.fixture(scope="module", params=["reference", "reference-dit"])
def model(request: pytest.FixtureRequest) -> LoadedModel:
    return load_model(request.param)


@pytest.fixture(scope="module")
def baseline(model: LoadedModel) -> Baseline:
    return make_baseline(model, **REQUEST)


def test_full_precision_loses_nothing_against_itself(model: LoadedModel, baseline: Baseline) -> None:
    found = baseline.measure(model.denoiser)
    assert found.images is not None and baseline.images is not None and torch.equal(found.images, baseline.images)
    for metric in METRICS:
        value = found.results.get(metric.key)
        if metric.against == "data":
            assert value == baseline.quality().get(metric.key)
        elif metric.flag in ("class-agreement", "feature-distance-c10") or metric.flag.endswith("to-full-precision"):
            assert value == pytest.approx(float(metric.higher_is_better), abs=1e-6)
        else:
            assert metric.key in found.results and value is None, "an infinite ratio"


def test_a_larger_error_is_worse_in_every_distance_to_full_precision(
    model: LoadedModel, baseline: Baseline, scaled: Scaled
) -> None:
    small, large = (baseline.measure(scaled(model.denoiser, 1 + r)).results for r in (0.01, 0.2))
    assert small["mean_noise_sqnr_db"] == pytest.approx(40, abs=0.01)
    assert large["mean_noise_sqnr_db"] == pytest.approx(20 * math.log10(5), abs=0.01)
    for metric in METRICS:
        if metric.against == "full precision":
            better, worse = (small, large) if metric.higher_is_better else (large, small)
            assert better[metric.key] >= worse[metric.key], metric.key


def test_a_missing_extra_is_known_before_anything_is_sampled(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    sampled: list[int] = []
    with pytest.raises(MissingExtraError, match=r"pip install 'ptq-tdq\[metrics\]'"):
        make_baseline(model, **REQUEST, on_progress=lambda done, total: sampled.append(done))
    assert sampled == []


def test_a_baseline_survives_the_disk(model: LoadedModel, baseline: Baseline, scaled: Scaled, tmp_path: Path) -> None:
    assert load_baseline(tmp_path, model, **REQUEST) is None
    save_baseline(tmp_path, baseline)
    found = load_baseline(tmp_path, model, **REQUEST)
    assert found is not None and found.quality() == baseline.quality()
    disturbed = scaled(model.denoiser, 1.1)
    assert found.measure(disturbed).results == baseline.measure(disturbed).results
    for other in ({"samples": COUNT + 1}, {"num_inference_steps": 3}, {"seed": 4}):
        assert load_baseline(tmp_path, model, **{**REQUEST, **other}) is None


@pytest.mark.parametrize("damaged", [CALLS, TENSORS])
def test_a_damaged_file_or_another_way_of_sampling_is_no_baseline(tiny: Tiny, tmp_path: Path, damaged: str) -> None:
    model, request = tiny(classes=3), {"samples": 3, "num_inference_steps": 2, "seed": 0}
    save_baseline(tmp_path, make_baseline(model, **request))
    assert load_baseline(tmp_path, model, **request) is not None
    assert load_baseline(tmp_path, tiny(DDPMScheduler(), classes=3), **request) is None
    model.sampler.classes = [1]  # type: ignore[attr-defined]
    assert load_baseline(tmp_path, model, **request) is None
    model.sampler.classes = None  # type: ignore[attr-defined]
    (tmp_path / damaged).write_bytes((tmp_path / damaged).read_bytes()[:-8])
    assert load_baseline(tmp_path, model, **request) is None


@pytest.mark.parametrize("channels", [3, 4])
def test_without_a_classifier_only_distances_to_full_precision_are_given(
    tiny: Tiny, scaled: Scaled, channels: int
) -> None:
    model = tiny(DDPMScheduler(), channels=channels)
    baseline = make_baseline(model, samples=3, num_inference_steps=2, seed=0)
    found = baseline.measure(scaled(model.denoiser, 1.1))
    images = {"image_sqnr_db", "image_psnr_db"} if channels == 3 else set()
    assert baseline.quality() == {}
    assert set(found.results) == {"latent_sqnr_db", "mean_noise_sqnr_db", "noise_sqnr_db"} | images
