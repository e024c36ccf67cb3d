"""Evaluations of the embedded model and of one without a classifier."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from torch import Tensor, nn

from ptq_tdq.calib_data import LoadedModel, load_model, unet_sha256
from ptq_tdq.errors import MissingExtraError
from ptq_tdq.evaluate.baseline import Baseline, is_embedded, load_baseline, make_baseline, save_baseline
from ptq_tdq.evaluate.names import METRICS

COUNT = 12


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return load_model()


@pytest.fixture(scope="module")
def baseline(model: LoadedModel) -> Baseline:
    return make_baseline(model, samples=COUNT, num_inference_steps=2, seed=3)


class Disturbed(nn.Module):
    """A U-Net with an error of a known relative size."""

    def __init__(self, unet: Any, ratio: float) -> None:
        super().__init__()
        self.unet, self.ratio, self.config = unet, ratio, unet.config

    def forward(self, sample: Tensor, timestep: Tensor, **kwargs: Any) -> tuple[Tensor]:
        return (self.unet(sample, timestep, **{**kwargs, "return_dict": False})[0] * (1 + self.ratio),)


def test_full_precision_loses_nothing_against_itself(model: LoadedModel, baseline: Baseline) -> None:
    found = baseline.measure(model.unet)
    assert found.images is not None and torch.equal(found.images, baseline.images)
    for metric in METRICS:
        value = found.results.get(metric.key)
        if metric.against == "data":
            assert value == baseline.quality().get(metric.key)
        elif metric.flag in ("class-agreement", "feature-distance-c10", "fd-c10-to-full-precision"):
            assert value == pytest.approx(float(metric.higher_is_better), abs=1e-6)
        else:
            assert metric.key in found.results and value is None, "an infinite ratio"


def test_a_larger_error_is_worse_in_every_distance_to_full_precision(model: LoadedModel, baseline: Baseline) -> None:
    small, large = (baseline.measure(Disturbed(model.unet, r)).results for r in (0.01, 0.2))
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
        make_baseline(
            model, samples=COUNT, num_inference_steps=2, seed=3, on_progress=lambda done, total: sampled.append(done)
        )
    assert sampled == []


def test_a_baseline_survives_the_disk(model: LoadedModel, baseline: Baseline, tmp_path: Path) -> None:
    path = tmp_path / "baseline.safetensors"
    request: dict[str, Any] = {"samples": COUNT, "num_inference_steps": 2, "seed": 3}
    assert load_baseline(path, model, **request) is None
    save_baseline(path, baseline)
    found = load_baseline(path, model, **request)
    assert found is not None and found.quality() == baseline.quality()
    disturbed = Disturbed(model.unet, 0.1)
    assert found.measure(disturbed).results == baseline.measure(disturbed).results
    for other in ({"samples": COUNT + 1}, {"num_inference_steps": 3}, {"seed": 4}):
        assert load_baseline(path, model, **{**request, **other}) is None
    path.write_bytes(path.read_bytes()[:1000])
    assert load_baseline(path, model, **request) is None


def test_the_embedded_model_is_known_by_its_name_and_by_its_folder(model: LoadedModel) -> None:
    folder = Path(__file__).parents[2] / "calib_data" / "reference"
    assert is_embedded(model) and is_embedded(load_model(str(folder)))


@pytest.mark.parametrize("channels", [3, 4])
def test_without_a_classifier_only_distances_to_full_precision_are_given(
    tiny_unet: Callable[..., UNet2DModel], channels: int
) -> None:
    unet = tiny_unet(in_channels=channels, out_channels=channels, block_out_channels=(8,), add_attention=False,
                     down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))  # fmt: skip
    model = LoadedModel(unet, DDPMScheduler(), None, "tiny", unet_sha256(unet))
    baseline = make_baseline(model, samples=3, num_inference_steps=2, seed=0)
    found = baseline.measure(Disturbed(unet, 0.1))
    assert baseline.quality() == {} and not is_embedded(model)
    images = {"image_sqnr_db", "image_psnr_db"} if channels == 3 else set()
    assert set(found.results) == {"latent_sqnr_db", "mean_noise_sqnr_db", "noise_sqnr_db"} | images


def test_a_stochastic_sampler_gives_each_sample_its_own_noise_whatever_the_number_of_samples(
    tiny_unet: Callable[..., UNet2DModel],
) -> None:
    """The comparison must not depend on batches: same seed and place, same noise."""
    unet = tiny_unet(block_out_channels=(8,), add_attention=False,
                     down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))  # fmt: skip
    model = LoadedModel(unet, DDPMScheduler(), None, "tiny", unet_sha256(unet))
    few, many = (make_baseline(model, samples=n, num_inference_steps=3, seed=1).reference for n in (51, 60))
    assert few.latents.shape[0] == 51 and not torch.equal(few.latents[0], few.latents[50])
    same = [i for i in range(51) if torch.equal(few.noise[i], many.noise[i])]
    torch.testing.assert_close(few.latents[same], many.latents[same])
    assert same
