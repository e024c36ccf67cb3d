"""The small pipelines behave like published ones: they load from a folder and follow prompt and noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from pipelines import PIPELINES, SmallPipeline
from torch import Tensor

CONDITIONS: dict[str | None, tuple[dict[str, Any], ...]] = {
    "prompt": ({"prompt": "A red fox, asleep"}, {"prompt": "12 boats at sea (oil on canvas)"}),
    "class_labels": ({"class_labels": [1]}, {"class_labels": [207]}),
    None: ({},),
}


@pytest.fixture(scope="module", params=PIPELINES, ids=lambda entry: entry.name)
def entry(request: pytest.FixtureRequest) -> SmallPipeline:
    return request.param


@pytest.fixture(scope="module")
def folder(entry: SmallPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(entry.name)
    entry.save(folder)
    return folder


@pytest.fixture(scope="module")
def pipe(folder: Path) -> DiffusionPipeline:
    pipe = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(entry: SmallPipeline, pipe: DiffusionPipeline, condition: dict[str, Any], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.as_tensor(pipe(**condition, **entry.call, generator=generator, return_dict=False)[0])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def test_a_folder_holds_the_named_pipeline_with_a_small_denoiser(entry: SmallPipeline, pipe: DiffusionPipeline) -> None:
    assert type(pipe).__name__ == entry.name
    parameters = list(getattr(pipe, entry.denoiser).parameters())
    assert 10_000 < sum(p.numel() for p in parameters) < 300_000
    assert all(bool(p.any()) for p in parameters if p.ndim > 1)  # none starts at zero and silences what it carries


def test_a_pipeline_is_saved_with_the_same_bytes_again(entry: SmallPipeline, folder: Path, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    entry.save(tmp_path)
    assert contents(tmp_path) == contents(folder)
    assert torch.equal(torch.get_rng_state(), before)


def test_two_steps_end_finite_and_follow_condition_and_noise(entry: SmallPipeline, pipe: DiffusionPipeline) -> None:
    samples = [sample(entry, pipe, condition) for condition in CONDITIONS[entry.condition]]
    samples.append(sample(entry, pipe, CONDITIONS[entry.condition][0], seed=1))
    assert all(bool(s.isfinite().all()) for s in samples)
    assert all((s - samples[0]).norm() > 1e-4 * s.norm() for s in samples[1:])
