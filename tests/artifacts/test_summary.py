from __future__ import annotations

import json
from pathlib import Path

import pytest

from ptq_tdq.artifacts import Artifact, read_artifact, summarize, write_artifact


def test_facts(artifact: Artifact, tmp_path: Path) -> None:
    write_artifact(tmp_path / "out", artifact)
    summary = summarize(read_artifact(tmp_path / "out"))
    assert summary == summarize(artifact)
    assert summary["choices"] == artifact.config["choices"]
    assert summary["file_bytes"] == {file.name: file.stat().st_size for file in sorted((tmp_path / "out").iterdir())}
    assert summary["bytes"] == sum(summary["file_bytes"].values())
    assert summary["fp32_bytes"] == 4 * (81 + 10 + 15 + 3 + 7 + 7 + 1)
    assert summary["num_layers"] == 4
    json.dumps(summary, allow_nan=False)


def test_quantizer_rows(artifact: Artifact) -> None:
    rows = {row["name"]: row for row in summarize(artifact)["quantizers"]}
    conv = rows["conv"]
    assert (conv["bits"], conv["zero_point_min"], conv["zero_point_max"]) == (8, 128, 128)
    expected = {"first": 0.1, "middle": 0.16, "last": 0.2, "mean": 0.15, "max_over_min": 2.0}
    for name, value in expected.items():
        assert conv[f"scale_{name}"] == pytest.approx(value, rel=1e-6)
    assert rows["proj"]["scale_mean"] is None


def test_weight_rows(artifact: Artifact) -> None:
    rows = {row["name"]: row for row in summarize(artifact)["weights"]}
    assert list(rows) == ["conv", "short", "proj"]
    assert (rows["conv"]["granularity"], rows["conv"]["bits"], rows["conv"]["channel_ranges"]) == ("per_channel", 4, 1)
    assert (rows["short"]["granularity"], rows["short"]["channel_ranges"]) == ("per_tensor", 2)
