from __future__ import annotations

import csv
import io
import json
import os
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from ptq_tdq.artifacts import Artifact, IntervalTable
from ptq_tdq.errors import ArtifactError, ConfigError, OutputError, UsageError
from ptq_tdq.export import export_tables, interval_frame
from ptq_tdq.load import build_quantized
from ptq_tdq.records import LayerRecord, QuantizerRecord
from ptq_tdq.timeaxis import TimeAxis

T = 2000  # entries of a table


@pytest.fixture
def artifact() -> Artifact:
    """Tables of random float32 bit patterns over the whole range of sensible intervals, 1e-38 to 1e35."""
    generator = torch.Generator().manual_seed(0)
    tables, layers = {}, []
    for name, bits in (("z, last", 8), ("a", 4)):
        layers.append(LayerRecord(name, "conv2d", "u", (0, 1), None, (QuantizerRecord(name, bits, "tdq", "mse"),)))
        scale = torch.empty(T).uniform_(-38, 35, generator=generator).double()
        zero_point = torch.randint(0, 2**bits, (T,), generator=generator, dtype=torch.int32)
        tables[name] = IntervalTable((10**scale).float(), zero_point)
    config: dict[str, Any] = {"time_axis": TimeAxis("timestep", T - 1).to_dict()}
    return Artifact(config, tuple(layers), tables, {}, {}, {}, {}, {}, "")


def read(file: Path, format: str) -> pd.DataFrame:
    if format == "csv":
        with file.open(newline="") as lines:
            header, *rows = csv.reader(lines)
        columns = dict(zip(header, zip(*rows, strict=True), strict=True))
        return pd.DataFrame({name: c if name == "layer" else [float(x) for x in c] for name, c in columns.items()})
    if format == "json":
        return pd.DataFrame(json.loads(file.read_text()))
    return pd.DataFrame(dict(np.load(file, allow_pickle=False)))


def test_an_artifact_is_a_folder_or_what_calibration_gave(
    artifact_of: Callable[[str], Artifact], tmp_path: Path
) -> None:
    artifact = artifact_of("W4A6")
    quantized = build_quantized(artifact)
    quantized.save_pretrained(tmp_path / "saved")
    for given in (quantized, tmp_path / "saved", str(tmp_path / "saved")):
        pd.testing.assert_frame_equal(interval_frame(given), interval_frame(artifact))
    wrong: Any = {}
    with pytest.raises(ConfigError, match=r"artifact must be a folder, a hub id, .* Got a dict instead"):
        export_tables(wrong, tmp_path / "x.csv", "csv")
    with pytest.raises(ArtifactError, match="nowhere"):
        export_tables(tmp_path / "nowhere", tmp_path / "x.csv", "csv")


def test_the_frame_states_the_quantizers_range(artifact: Artifact) -> None:
    frame = interval_frame(artifact)
    assert list(frame.columns) == ["layer", "t", "scale", "zero_point", "qmin", "qmax", "lo", "hi"]
    assert list(frame["layer"].unique()) == ["z, last", "a"]
    assert frame["t"].tolist() == 2 * list(range(T))
    assert set(frame["qmin"]) == {0}
    assert set(frame["qmax"]) == {15, 255}
    scale = frame["scale"].to_numpy()
    assert scale.dtype == np.float32
    np.testing.assert_array_equal(frame["lo"], scale * (frame["qmin"] - frame["zero_point"]).to_numpy(np.float32))
    np.testing.assert_array_equal(frame["hi"], scale * (frame["qmax"] - frame["zero_point"]).to_numpy(np.float32))
    assert (frame["lo"] <= 0).all()
    assert (frame["hi"] >= 0).all()


@pytest.mark.parametrize("format", ["csv", "json", "npz"])
def test_round_trip_is_exact(tmp_path: Path, artifact: Artifact, format: str) -> None:
    export_tables(artifact, tmp_path / "tables", format)
    frame, again = interval_frame(artifact), read(tmp_path / "tables", format)
    assert list(again.columns) == list(frame.columns)
    for name in frame:
        np.testing.assert_array_equal(
            again[name].to_numpy().astype(frame[name].to_numpy().dtype), frame[name].to_numpy()
        )


@pytest.mark.parametrize("format", ["csv", "json"])
def test_decimals_are_the_shortest(tmp_path: Path, artifact: Artifact, format: str) -> None:
    tenth = IntervalTable(torch.full((T,), 0.1), torch.zeros(T, dtype=torch.int32))
    export_tables(replace(artifact, tables=dict.fromkeys(artifact.tables, tenth)), tmp_path / "tables", format)
    assert "0.1000000" not in (tmp_path / "tables").read_text()
    assert read(tmp_path / "tables", format)["scale"].tolist() == [0.1] * (2 * T)


@pytest.mark.parametrize("format", ["csv", "json", "npz"])
def test_same_tables_same_bytes(tmp_path: Path, artifact: Artifact, format: str) -> None:
    export_tables(artifact, tmp_path / "first", format)
    export_tables(artifact, tmp_path / "second", format)
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


def test_npz_members_carry_no_clock(tmp_path: Path, artifact: Artifact) -> None:
    export_tables(artifact, tmp_path / "tables.npz", "npz")
    with zipfile.ZipFile(io.BytesIO((tmp_path / "tables.npz").read_bytes())) as archive:
        assert {member.date_time for member in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_dynamic_quantizers_have_no_table(tmp_path: Path, artifact: Artifact) -> None:
    dynamic = {**artifact.tables, "a": IntervalTable(None, torch.zeros(1, dtype=torch.int32))}
    with pytest.raises(UsageError, match=r"'a' is dynamic: .* no table"):
        export_tables(replace(artifact, tables=dynamic), tmp_path / "tables", "csv")
    assert os.listdir(tmp_path) == []


def test_unknown_format(tmp_path: Path, artifact: Artifact) -> None:
    with pytest.raises(UsageError, match=r"one of csv, json, npz\. Got 'xlsx' instead"):
        export_tables(artifact, tmp_path / "tables", "xlsx")


def test_a_file_as_parent(tmp_path: Path, artifact: Artifact) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError):
        export_tables(artifact, tmp_path / "file" / "tables", "csv")


def test_an_artifact_without_quantizers_gives_empty_columns(tmp_path: Path, artifact: Artifact) -> None:
    export_tables(replace(artifact, layers=(), tables={}), tmp_path / "tables", "csv")
    assert (tmp_path / "tables").read_text() == "layer,t,scale,zero_point,qmin,qmax,lo,hi\n"
