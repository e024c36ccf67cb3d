"""The page and its numbers: what they say, that nothing breaks out of them, and that nothing is asked of a network."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ptq_tdq.artifacts import Artifact
from ptq_tdq.calib_data import LoadedModel, LoopSampler, Sampled
from ptq_tdq.errors import ArtifactMismatchError
from ptq_tdq.evaluate.trajectories import Reference
from ptq_tdq.quantized_model import QuantizedModel
from ptq_tdq.report.data import clipped, correlation, report_data
from ptq_tdq.report.findings import checks, findings, lowest, seeds, spread, worst_layers
from ptq_tdq.report.page import render_page
from ptq_tdq.report.survey import PICTURES, Subject, Survey, sheet, survey, thumbnails
from ptq_tdq.report.write import samples_of
from ptq_tdq.search import Histogram

Json = dict[str, Any]


class Reader(HTMLParser):
    """Collects texts, scripts and every address in a page."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.scripts, self.links, self.tags = "", [""], [], set()
        self.inside = ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.inside = tag if tag in ("script", "style") else ""
        if tag == "script":
            self.scripts.append("")
        self.links += [value or "" for key, value in attributes if key in ("src", "href", "srcset", "action")]

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside == "script":
            self.scripts[-1] += data
        elif not self.inside:
            self.text += data


def read(page: str) -> tuple[Reader, Json]:
    reader = Reader()
    reader.feed(page)
    return reader, next(json.loads(text) for text in reader.scripts if text.startswith("{"))


@pytest.fixture(scope="session")
def folder(quantized: QuantizedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("artifacts") / "out"
    quantized.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def data(quantized: QuantizedModel, reference: Reference, folder: Path) -> Json:
    """The numbers of a report with measurements."""
    subject = Subject("mine", folder, quantized.to_artifact())
    return report_data(survey([subject], reference.model, samples=4, num_inference_steps=3))


def alone(artifact: Artifact, *names: str) -> Json:
    """The numbers of a report without the base model."""
    return report_data(Survey(tuple(Subject(name, Path(name), artifact) for name in names)))


def test_the_numbers_are_json_in_the_order_of_t(data: Json, quantized: QuantizedModel) -> None:
    json.dumps(data, allow_nan=False)
    assert data["steps"] == sorted(data["steps"]) and len(data["steps"]) == 3
    assert data["num_train_timesteps"] == 1000 and data["groups"] == ["class 0", "class 1", "class 2"]
    (artifact,) = data["artifacts"]
    assert [layer["name"] for layer in artifact["layers"]] == [record.name for record in quantized.plan]
    assert all(len(artifact["errors"][key]) == len(quantized.plan) for key in ("inputs", "own", "accumulated"))
    # t = 0 is the last step of the sampler: its predictions are compared with those of the model at t = 0
    assert artifact["errors"]["prediction"][0] == artifact["errors"]["accumulated"][-1][0]


def test_curves_are_those_of_the_tables(data: Json, quantized: QuantizedModel) -> None:
    tables = quantized.to_artifact().tables
    for name, shown in data["artifacts"][0]["tables"].items():
        scale = tables[name].scale
        assert scale is not None
        drawn = np.interp(np.arange(len(scale)), shown["scale"]["t"], shown["scale"]["v"])
        assert np.abs(drawn - scale.numpy()).max() <= 0.004 * float(scale.max())
        width = float(scale.max()) * (2 ** shown["bits"] - 1)
        high = scale * (2 ** shown["bits"] - 1 - tables[name].zero_point)
        drawn = np.interp(np.arange(len(scale)), shown["hi"]["t"], shown["hi"]["v"])
        assert np.abs(drawn - high.numpy()).max() <= 0.004 * width


def test_a_step_tables_intervals_are_the_best_ones_where_they_were_searched(data: Json) -> None:
    """A step-table is the search itself, on other trajectories: it must be near the best and follow it."""
    tables = [t for t in data["artifacts"][0]["tables"].values() if t["method"] == "step-table"]
    assert np.median([t["off"] for t in tables]) < 0.2


def test_clipped_is_the_share_outside() -> None:
    histogram = Histogram(torch.tensor([[1.0, 2, 3, 4]]), torch.tensor([-1.0, 0, 1, 2]), torch.zeros(1), torch.ones(1))
    assert clipped(histogram, torch.tensor([-0.5]), torch.tensor([1.5])).item() == pytest.approx(0.5)
    assert clipped(histogram, torch.tensor([-9.0]), torch.tensor([9.0])).item() == 0


def test_correlation_of_curves() -> None:
    rising = torch.tensor([1.0, 2, 4, 8])
    assert correlation(rising, 3 * rising) == pytest.approx(1)
    assert correlation(rising, 1 / rising) == pytest.approx(-1)
    assert correlation(rising, torch.ones(4)) is None


def test_the_worst_come_first(data: Json) -> None:
    artifact = data["artifacts"][0]
    ranked = worst_layers(artifact)
    assert [v for _, v in ranked] == sorted(v for _, v in ranked) and len(ranked) == len(artifact["layers"])
    assert lowest([3.0, None, 1.0]) == 2 and lowest([None]) is None
    answers = dict(findings(data, artifact))
    assert any(ranked[0][0] in sentence for sentence in answers["What is lost, and where?"])


def test_what_stays_in_floating_point_is_said(quantized: QuantizedModel) -> None:
    metrics = {"coverage": 0.875, "notices": ["In floating point: conv_in, since it is so.", "No attention products."]}
    artifact = replace(quantized.to_artifact(), metrics=metrics)
    shown = alone(artifact, "mine")
    sentences = dict(findings(shown, shown["artifacts"][0]))["What is quantized?"]
    assert sentences[0].startswith("Quantized layers do 87.5% of the multiply-accumulates")
    products = sum(record.kind == "product" for record in quantized.plan)
    assert f"{products} attention product is quantized." in sentences and products == 1
    assert sentences[-2:] == metrics["notices"]
    reader, _ = read(render_page(shown, {}))
    assert all(text in reader.text for text in metrics["notices"])
    shown = alone(replace(artifact, metrics={}), "mine")
    assert "multiply-accumulates" not in str(findings(shown, shown["artifacts"][0]))


def test_the_time_axis_is_shown_as_an_equation(quantized: QuantizedModel) -> None:
    artifact = quantized.to_artifact()
    for (scale, offset), expected in {
        (1.0, 0.0): "t = 'timestep'",
        (1000.0, 0.0): "t = 1000 \u00d7 'timestep'",
        (-1000.0, 1000.0): "t = 1000 \u2212 1000 \u00d7 'timestep'",
        (125.5, 250.0): "t = 125.5 \u00d7 'timestep' + 250",
    }.items():
        axis = replace(artifact.time_axis, scale=scale, offset=offset)
        shown = alone(replace(artifact, config=artifact.config | {"time_axis": axis.to_dict()}), "mine")
        reader, _ = read(render_page(shown, {}))
        assert f"{expected}, from 0 to 1000" in reader.text


def test_the_calibration_set_is_described_without_its_prompts(quantized: QuantizedModel) -> None:
    artifact = quantized.to_artifact()
    said = {"prompts": [LONG] * 48, "call": {"guidance_scale": 6.5}, "classes": None, "rows": 9}
    made = {"calibration_set": artifact.config["calibration_set"] | said}
    reader, _ = read(render_page(alone(replace(artifact, config=artifact.config | made), "a"), {}))
    assert "prompts48" in reader.text and "guidance_scale6.5" in reader.text and "rows9" in reader.text
    assert LONG not in reader.text


def test_checks_say_what_is_wrong(data: Json) -> None:
    artifact = copy.deepcopy(data["artifacts"][0])
    (layer,) = (layer for layer in artifact["layers"] if "first" in layer["roles"])
    assert layer["name"] == "conv_in"
    first = artifact["tables"]["conv_in"]["clipped"]
    first[:] = [0.0] * len(first)
    assert {state for state, _ in checks(data, artifact)} == {"ok", "unknown"}  # it was not measured at calibration
    first[0] = 0.25
    others = [other for other in artifact["layers"] if other is not layer]
    for layers in ([{**layer, "quantizers": []}, *others], others):  # weights alone, or skipped
        assert any("x_t is not quantized" in text for _, text in checks(data, {**artifact, "layers": layers}))
    unseen = [{**other, "roles": []} for other in artifact["layers"]]
    assert not any("x_t" in text for _, text in checks(data, {**artifact, "layers": unseen}))
    artifact["reconstruction"] = {"weights": [{"unit": "u", "before": 1.0, "after": 2.0}]}
    warnings = " ".join(text for state, text in checks(data, artifact) if state == "warn")
    assert "clipped (up to 25.00%" in warnings and "higher loss than they began with: u" in warnings


def test_a_measurement_from_calibration_is_compared(data: Json) -> None:
    for there, state in ((1.0, "ok"), (9.0, "warn")):
        artifact = copy.deepcopy(data["artifacts"][0])
        here = artifact["latent_sqnr_db"]
        artifact["stored"] = {"samples": 7, "learned": {"latent_sqnr_db": here + there}, "static": None}
        (found,) = (check for check in checks(data, artifact) if "at calibration" in check[1])
        assert found[0] == state and f"{here:.1f} dB here on 4 samples, {here + there:.1f} dB" in found[1]


def test_the_page_asks_nothing_of_a_network(data: Json) -> None:
    reader, embedded = read(render_page(data, {}))
    assert embedded["steps"] == data["steps"]
    assert reader.links and all(link.startswith(("#", "data:")) for link in reader.links)
    assert not reader.tags & {"link", "iframe", "object", "embed", "base"}
    for layer in data["artifacts"][0]["layers"]:
        assert any(layer["name"] in script for script in reader.scripts)


def test_names_do_not_break_out_of_the_page(quantized: QuantizedModel) -> None:
    name = "</script><img src=x onerror=alert(1)>\u2028'\""
    reader, embedded = read(render_page(alone(quantized.to_artifact(), name), {}))
    assert embedded["artifacts"][0]["name"] == name and name in reader.text
    assert "img" not in reader.tags


def test_without_the_model_the_page_says_what_is_missing(quantized: QuantizedModel) -> None:
    artifact = replace(quantized.to_artifact(), metrics={})
    reader, embedded = read(render_page(alone(artifact, "mine"), {}))
    assert embedded["artifacts"][0]["errors"] is None and embedded["activations"] == {}
    assert (
        "Not compared with the full-precision model" in reader.text and "holds no reconstruction losses" in reader.text
    )
    assert "canvas" not in reader.tags


def test_seeds_are_artifacts_that_differ_in_nothing_else(quantized: QuantizedModel) -> None:
    artifact = quantized.to_artifact()

    def change(**choices: Any) -> Artifact:
        config = {**artifact.config, "choices": artifact.config["choices"] | choices}
        return replace(artifact, config={**config, "seed": config["choices"]["seed"]})

    made = [change(seed=0), change(seed=1, method="static"), change(seed=1), change(seed=0)]
    data = report_data(Survey(tuple(Subject(str(i), Path(), a) for i, a in enumerate(made))))
    assert seeds(data) == [[0, 2, 3]]
    assert "deviates by 0.0%" in str(spread(data))  # the tables are the same
    assert seeds(alone(artifact, "a", "b")) == [] and spread(alone(artifact, "a", "b")) is None


class Sounds(LoopSampler):
    """The same samples, but nothing that one could look at; they have prompts instead of classes."""

    def conditions(self, count: int) -> list[Any]:
        return [LONG if i % 2 else "A short one" for i in range(count)]

    def run(self, denoiser: Any, conditions: Any, *rest: Any) -> Sampled:
        classes = [len(text) % 3 for text in conditions]
        return Sampled(super().run(denoiser, classes, *rest).latents, None)


class Videos(LoopSampler):
    """The same samples as videos of one frame."""

    def run(self, *args: Any) -> Sampled:
        sampled = super().run(*args)
        return Sampled(sampled.latents[:, :, None], sampled.images)


LONG = "A cellist on an empty stage, seen from the last row of a theatre by candlelight"


def test_sounds_have_no_pictures_and_prompts_are_shortened(
    quantized: QuantizedModel, model: LoadedModel, folder: Path
) -> None:
    sounds = replace(model, sampler=Sounds(model.denoiser, model.scheduler))
    found = survey([Subject("mine", folder, quantized.to_artifact())], sounds, samples=4, num_inference_steps=2)
    data = report_data(found)
    assert data["condition"] == "prompt" and data["end"] == "latents" and data["artifacts"][0]["image_psnr_db"] is None
    short, cut = data["groups"]
    assert short == "A short one" and cut.endswith("\u2026") and LONG.startswith(cut[:-1]) and 20 < len(cut) <= 40
    assert samples_of(found) == {}
    reader, _ = read(render_page(data, {}))
    assert "no sample pictures" in reader.text and "img" not in reader.tags and "Final latents" in reader.text


def test_of_a_video_the_first_frame_is_shown(quantized: QuantizedModel, model: LoadedModel, folder: Path) -> None:
    videos = replace(model, sampler=Videos(model.denoiser, model.scheduler))
    found = survey([Subject("mine", folder, quantized.to_artifact())], videos, samples=3, num_inference_steps=2)
    assert any("of each its first frame" in text for text in found.notices)
    images = samples_of(found)
    assert list(images) == ["full precision", "mine"] and images["mine"].shape == (3, 3, 8, 8)


def test_large_pictures_are_made_smaller_and_small_ones_are_left_alone() -> None:
    small = torch.rand(3, 3, 32, 20) * 2 - 1
    assert torch.equal(thumbnails(small), small)
    large = torch.full((PICTURES + 5, 1, 320, 640), 0.25)
    shown = thumbnails(large)
    assert shown.shape == (PICTURES, 1, 80, 160) and torch.allclose(shown, torch.tensor(0.25))
    assert sheet(shown, ["a prompt"] * PICTURES).height > sheet(shown, [None] * PICTURES).height  # words above


def test_artifacts_of_different_models_are_not_compared(quantized: QuantizedModel) -> None:
    artifact = quantized.to_artifact()
    other = replace(artifact, config=artifact.config | {"base_model": {"id": "other", "sha256": "0" * 64}})
    with pytest.raises(ArtifactMismatchError, match="'a' and 'b' were made from different models"):
        survey([Subject("a", Path(), artifact), Subject("b", Path(), other)], None)
