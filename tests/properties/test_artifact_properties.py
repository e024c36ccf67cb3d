"""Artifacts: what is written comes back, and any damage is a typed error, never another exception or silence."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ptq_tdq import preset
from ptq_tdq.artifacts import (
    Artifact,
    IntervalTable,
    encode_artifact,
    model_card,
    pack,
    read_artifact,
    unpack,
    write_artifact,
)
from ptq_tdq.artifacts.document import encode_json, sign
from ptq_tdq.errors import ArtifactError
from ptq_tdq.records import LayerRecord, QuantizerRecord

CHOICES = preset("default").to_dict()
DATA_FILES = ("interval_tables.safetensors", "metrics.json", "ptq_tdq_config.json", "weights.safetensors")
SHAPES = {"linear": (4, 3), "conv1d": (3, 2, 3), "conv2d": (2, 5, 1, 1)}

names = st.text(st.characters(categories=("L", "N", "P", "S", "Z")), min_size=1, max_size=8)
bit_widths = st.integers(2, 8)
floats = st.floats(allow_nan=False, allow_infinity=False)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | floats | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def scales(draw: st.DrawFn, *shape: int) -> torch.Tensor:
    size = torch.Size(shape).numel()
    exact = st.floats(min_value=2**-100, max_value=2**100, width=32)
    return torch.tensor(draw(st.lists(exact, min_size=size, max_size=size)), dtype=torch.float32).reshape(shape)


def integers(draw: st.DrawFn, high: int, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    size = torch.Size(shape).numel()
    values = draw(st.lists(st.integers(0, high), min_size=size, max_size=size))
    return torch.tensor(values, dtype=dtype).reshape(shape)


@st.composite
def artifacts(draw: st.DrawFn) -> Artifact:
    steps = draw(st.integers(2, 6))
    layers, tables = [], {}
    codes, scale, zero_point = {}, {}, {}
    for name in draw(st.lists(names, max_size=3, unique=True)):
        kind, bits, method = (
            draw(st.sampled_from(sorted(SHAPES))),
            draw(bit_widths),
            draw(st.sampled_from(["tdq", "dynamic", "dynamic-statistics"])),
        )
        shape, weight_bits = SHAPES[kind], draw(st.none() | bit_widths)
        layers.append(
            LayerRecord(name, kind, "unit", (0, shape[1]), weight_bits, (QuantizerRecord(name, bits, method, "mse"),))
        )
        dynamic, network = method != "tdq", method == "dynamic-statistics"
        parts = draw(st.lists(names, min_size=1, max_size=2, unique=True)) if network else []
        tables[name] = IntervalTable(
            None if dynamic else scales(draw, steps),
            integers(draw, 2**bits - 1, torch.int32, 1 if dynamic else steps),
            {part: scales(draw, draw(st.integers(1, 3))) for part in parts},
        )
        if weight_bits is not None:
            channels = draw(st.sampled_from([1, shape[0]]))
            codes[name] = integers(draw, 2**weight_bits - 1, torch.uint8, *shape)
            scale[name] = scales(draw, channels, 1)
            zero_point[name] = integers(draw, 2**weight_bits - 1, torch.int32, channels, 1)
    config = {
        "base_model": {"id": draw(names), "sha256": "a" * 64},
        "model_config": draw(st.dictionaries(st.text(), json_values, max_size=2)),
        "scheme": "W4A8",
        "method": "tdq",
        "preset": "default",
        "choices": draw(st.dictionaries(st.text(), json_values, max_size=2)) | CHOICES,
        "time_axis": {"argument": "t", "num_train_timesteps": steps - 1, "scale": 1.0, "offset": 0.0},
        "calibration_set": {"sha256": "b" * 64},
        "seed": draw(st.integers()),
        "versions": draw(st.dictionaries(st.text(), st.text(), max_size=2)),
    }
    metrics = draw(st.dictionaries(st.text(), json_values, max_size=2))
    biases = {
        f"{name}/bias": torch.tensor(draw(st.floats(-1, 1, width=32))) for name in draw(st.sets(names, max_size=2))
    }
    return Artifact(
        config, tuple(layers), tables, codes, scale, zero_point, biases, metrics, model_card(config, metrics)
    )


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    """The files of one artifact that has a bit of everything."""
    layer = LayerRecord("a", "linear", "u", (0, 3), 4, (QuantizerRecord("a", 8, "tdq", "mse"),))
    config: dict[str, Any] = {
        "base_model": {"id": "owner/model", "sha256": "a" * 64},
        "model_config": {},
        "scheme": "W4A8",
        "method": "tdq",
        "preset": "default",
        "choices": {"p": 2.4, **CHOICES},
        "time_axis": {"argument": "t", "num_train_timesteps": 1, "scale": 1.0, "offset": 0.0},
        "calibration_set": {"sha256": "b" * 64},
        "seed": 0,
        "versions": {"torch": "2"},
    }
    one = torch.ones(1, 1)
    return encode_artifact(
        Artifact(
            config,
            (layer,),
            {"a": IntervalTable(torch.ones(2), torch.zeros(2, dtype=torch.int32))},
            {"a": torch.ones(2, 3, dtype=torch.uint8)},
            {"a": one},
            {"a": one.int()},
            {"a.bias": torch.ones(2)},
            {"sqnr_db": 21.5},
            "card",
        )
    )


def read_bytes(files: dict[str, bytes]) -> Artifact:
    with tempfile.TemporaryDirectory() as folder:
        for name, data in files.items():
            (Path(folder) / name).write_bytes(data)
        return read_artifact(folder)


@given(artifacts())
@settings(deadline=None, max_examples=60)
def test_what_is_written_comes_back(artifact: Artifact) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_artifact(Path(folder) / "out", artifact)
        again = read_artifact(Path(folder) / "out")
    assert (again.config, again.layers, again.metrics) == (artifact.config, artifact.layers, artifact.metrics)
    assert again.card == artifact.card
    for part in ("weight_codes", "weight_scale", "weight_zero_point", "float_state"):
        torch.testing.assert_close(getattr(again, part), getattr(artifact, part), rtol=0, atol=0)
    assert encode_artifact(again) == encode_artifact(artifact)


@given(st.sampled_from(DATA_FILES), st.integers(0), st.integers(1, 255))
@settings(deadline=None, max_examples=300)
def test_any_altered_byte_is_an_error(files: dict[str, bytes], name: str, position: int, difference: int) -> None:
    data = bytearray(files[name])
    data[position % len(data)] ^= difference
    with pytest.raises(ArtifactError):
        read_bytes({**files, name: bytes(data)})


@given(st.sampled_from(DATA_FILES), st.integers(0))
@settings(deadline=None, max_examples=150)
def test_any_truncation_is_an_error(files: dict[str, bytes], name: str, length: int) -> None:
    with pytest.raises(ArtifactError):
        read_bytes({**files, name: files[name][: length % len(files[name])]})


@given(st.sampled_from(DATA_FILES), st.binary(min_size=1, max_size=20))
@settings(deadline=None, max_examples=50)
def test_anything_appended_is_an_error(files: dict[str, bytes], name: str, tail: bytes) -> None:
    with pytest.raises(ArtifactError):
        read_bytes({**files, name: files[name] + tail})


@given(st.data(), json_values)
@settings(deadline=None, max_examples=300)
def test_any_value_anywhere_in_a_signed_config_is_accepted_or_a_typed_error(
    files: dict[str, bytes], data: st.DataObject, value: Any
) -> None:
    """Wrong content under right hashes: no other exception type, whatever stands where."""
    document = json.loads(files["ptq_tdq_config.json"])
    place: Any = document
    while True:
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        if not isinstance(place[key], (dict, list)) or not place[key] or data.draw(st.booleans()):
            break
        place = place[key]
    place[key] = value
    try:
        again = read_bytes({**files, "ptq_tdq_config.json": encode_json(sign(document), "config")})
    except ArtifactError:
        return
    encode_artifact(again)


@given(st.data(), bit_widths, st.lists(st.integers(0, 5), min_size=1, max_size=4))
def test_packing_round_trip(data: st.DataObject, bits: int, shape: list[int]) -> None:
    codes = integers(data.draw, 2**bits - 1, torch.uint8, *shape)  # type: ignore[arg-type]
    packed = pack(codes, bits)
    assert len(packed) == -(-codes.numel() * (bits if bits in (2, 4) else 8) // 8)
    assert torch.equal(unpack(packed, bits, shape), codes)
