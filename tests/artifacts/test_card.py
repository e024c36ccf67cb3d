from __future__ import annotations

import json
from typing import Any

import pytest

from ptq_tdq.artifacts import Artifact, model_card, public_name


def front_matter(card: str) -> dict[str, Any]:
    start, block, _ = card.split("---\n", 2)
    assert start == ""
    return {key: json.loads(value) for key, value in (line.split(": ", 1) for line in block.splitlines())}


def test_front_matter_for_the_hub(artifact: Artifact) -> None:
    fields = front_matter(artifact.card)
    assert fields["library_name"] == "ptq-tdq"
    assert fields["base_model"] == "owner/model"
    assert "w4a8" in fields["tags"]


def test_the_front_matter_is_yaml(artifact: Artifact) -> None:
    yaml = pytest.importorskip("yaml")
    assert yaml.safe_load(artifact.card.split("---\n", 2)[1]) == front_matter(artifact.card)


FOLDER = '"path/to/this/folder"'
DIFFUSERS = {"_class_name": "UNet2DModel", "_diffusers_version": "0.39.0"}


@pytest.mark.parametrize(
    ("base_model", "model_config", "line"),
    [
        ({"id": "a/b", "component": "transformer"}, DIFFUSERS, f"pipe.transformer = load_quantized({FOLDER})"),
        ({"id": "a/b"}, DIFFUSERS, f"model = load_quantized({FOLDER})"),
        ({"id": "Own"}, {"_class_name": "Own"}, f"model = load_quantized({FOLDER}, model=Own(...))"),
    ],
)
def test_usage_is_that_of_the_kind_of_model(
    artifact: Artifact, base_model: dict[str, str], model_config: dict[str, str], line: str
) -> None:
    about = {"base_model": {**base_model, "sha256": "a" * 64}, "model_config": model_config}
    card = model_card({**artifact.config, **about}, {})
    assert f"\n{line}\n" in card and ("diffusers pipeline" in card) == ("component" in base_model)
    fields = front_matter(card)
    assert ("diffusers" in fields["tags"]) == (model_config is DIFFUSERS)
    assert fields.get("base_model") == (base_model["id"] if "/" in base_model["id"] else None)


def test_measurements_and_the_plain_word_about_simulation(artifact: Artifact) -> None:
    assert "| final.sqnr_db | 21.25 |" in artifact.card
    assert "**simulates** integer arithmetic" in artifact.card


def test_without_metrics_it_says_so(artifact: Artifact) -> None:
    assert "Nothing has been measured yet." in model_card(artifact.config, {})


@pytest.mark.parametrize(
    "path",
    ["/home/me/secret/ddpm", "./secret/ddpm/", "../secret/ddpm", "~/secret/ddpm", "C:\\secret\\ddpm", "a/secret/ddpm"],
)
def test_a_local_model_appears_by_its_name_only(artifact: Artifact, path: str) -> None:
    card = model_card({**artifact.config, "base_model": {"id": path, "sha256": "a" * 64}}, {})
    assert "secret" not in card
    assert public_name(path) == "ddpm" and "# ddpm W4A8" in card
    assert "base_model" not in front_matter(card)
