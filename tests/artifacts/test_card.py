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


def test_usage_measurements_and_the_plain_word_about_simulation(artifact: Artifact) -> None:
    assert 'pipe.unet = load_quantized("path/to/this/folder")' in artifact.card
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
