from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import fields, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import safetensors.numpy
import torch
from safetensors.torch import load, save

from ptq_tdq.artifacts import Artifact, check_base_model, encode_artifact, read_artifact, schema, write_artifact
from ptq_tdq.artifacts.document import encode_json, sign
from ptq_tdq.errors import ArtifactCorruptError, ArtifactError, ArtifactMismatchError, ConfigError, OutputError
from ptq_tdq.records import LayerRecord, QuantizerRecord

FILES = ["README.md", "interval_tables.safetensors", "metrics.json", "ptq_tdq_config.json", "weights.safetensors"]


@pytest.fixture
def folder(tmp_path: Path, artifact: Artifact) -> Path:
    write_artifact(tmp_path / "out", artifact)
    return tmp_path / "out"


def resign(folder: Path, change: Callable[[dict[str, Any]], None] = lambda _: None) -> None:
    """Change the config and make all hashes right again, as somebody who writes artifacts by other means would."""
    document = json.loads((folder / "ptq_tdq_config.json").read_bytes())
    for name in document["files"]:
        document["files"][name] = sha256((folder / name).read_bytes()).hexdigest()
    change(document)
    (folder / "ptq_tdq_config.json").write_bytes(encode_json(sign(document), "config"))


def change_tensors(folder: Path, name: str, **tensors: torch.Tensor | None) -> None:
    """Replace (or remove: None) tensors of a file; "." is written "__" in the keyword."""
    found = load((folder / name).read_bytes())
    for key, tensor in tensors.items():
        found.pop(key.replace("__", "."), None)
        if tensor is not None:
            found[key.replace("__", ".")] = tensor
    (folder / name).write_bytes(save(found))
    resign(folder)


def test_the_files_and_nothing_else(folder: Path) -> None:
    assert sorted(os.listdir(folder)) == FILES
    assert all((folder / name).stat().st_mode & 0o777 == 0o644 & ~current_umask() for name in FILES)


def current_umask() -> int:
    umask = os.umask(0o022)
    os.umask(umask)
    return umask


def test_round_trip(folder: Path, artifact: Artifact) -> None:
    again = read_artifact(folder)
    assert (again.config, again.layers, again.metrics, again.card) == (
        artifact.config,
        artifact.layers,
        artifact.metrics,
        artifact.card,
    )
    for part in ("weight_codes", "weight_scale", "weight_zero_point", "float_state"):
        torch.testing.assert_close(getattr(again, part), getattr(artifact, part), rtol=0, atol=0)
    for name, table in artifact.tables.items():
        torch.testing.assert_close(again.tables[name].scale, table.scale, rtol=0, atol=0)
        torch.testing.assert_close(again.tables[name].zero_point, table.zero_point, rtol=0, atol=0)


def test_same_content_same_bytes(artifact: Artifact) -> None:
    shuffled = replace(
        artifact,
        config=dict(reversed(artifact.config.items())),
        tables=dict(reversed(artifact.tables.items())),
        float_state={name: tensor.clone() for name, tensor in reversed(artifact.float_state.items())},
    )
    assert encode_artifact(shuffled) == encode_artifact(artifact)


def test_other_programs_read_it_as_documented(folder: Path, artifact: Artifact) -> None:
    weights = safetensors.numpy.load_file(folder / "weights.safetensors")
    packed, shape = weights["conv.weight_codes"], weights["conv.weight_shape"]
    codes = np.stack([packed & 15, packed >> 4], axis=1).ravel()[: shape.prod()].reshape(shape)
    np.testing.assert_array_equal(codes, artifact.weight_codes["conv"].numpy())
    tables = safetensors.numpy.load_file(folder / "interval_tables.safetensors")
    assert tables["attn.products.0.softmax.scale"].dtype == np.float32
    assert tables["attn.products.0.softmax.zero_point"].dtype == np.int32
    assert tables["proj.zero_point"].tolist() == [3]
    assert "proj.scale" not in tables


def test_the_config_follows_the_published_schema(folder: Path) -> None:
    document = json.loads((folder / "ptq_tdq_config.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema())
    jsonschema.validate(document, schema(), cls=jsonschema.Draft202012Validator)
    for name in document["files"]:
        assert document["files"][name] == sha256((folder / name).read_bytes()).hexdigest()


@pytest.mark.parametrize(("definition", "record"), [("layer", LayerRecord), ("quantizer", QuantizerRecord)])
def test_the_schema_knows_each_field_of_a_record(definition: str, record: type) -> None:
    names = [field.name for field in fields(record)]
    assert list(schema()["$defs"][definition]["properties"]) == names
    assert schema()["$defs"][definition]["required"] == names


def test_the_model_card_may_be_edited(folder: Path) -> None:
    (folder / "README.md").write_text("Mine.")
    assert read_artifact(folder).card == "Mine."


def test_overwrite(folder: Path, artifact: Artifact) -> None:
    with pytest.raises(OutputError, match="not empty"):
        write_artifact(folder, artifact)
    write_artifact(folder, replace(artifact, card="second"), overwrite=True)
    assert read_artifact(folder).card == "second"
    assert os.listdir(folder.parent) == ["out"]


def test_overwrite_never_removes_foreign_files(folder: Path, artifact: Artifact) -> None:
    (folder / "thesis.tex").touch()
    with pytest.raises(OutputError, match=r"holds 'thesis\.tex', which is no part of an artifact"):
        write_artifact(folder, artifact, overwrite=True)
    assert (folder / "thesis.tex").exists()


def test_base_model(artifact: Artifact) -> None:
    check_base_model(artifact, "a" * 64)
    with pytest.raises(ArtifactMismatchError, match=f"'owner/model' with weights {'a' * 64}.*Got .*{'c' * 64}"):
        check_base_model(artifact, "c" * 64)


@pytest.mark.parametrize("path", ["missing", "out/metrics.json", "", "\0", "x" * 300])
def test_not_an_artifact(folder: Path, path: str) -> None:
    with pytest.raises(ArtifactError, match="give the path of a ptq-tdq artifact"):
        read_artifact(folder.parent / path)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(ArtifactError, match=name):
        read_artifact(folder)


@pytest.mark.parametrize(
    "text", ["", "[]", "1", '"x"', "null", "{", "{}", "[" * 100_000, '{"a": NaN}', "\ufeff{}", "1" * 5000]
)
def test_a_config_that_is_no_document(folder: Path, text: str) -> None:
    (folder / "ptq_tdq_config.json").write_text(text)
    with pytest.raises(ArtifactCorruptError, match=r"ptq_tdq_config\.json"):
        read_artifact(folder)


def test_a_reformatted_config_is_not_the_one_that_was_written(folder: Path) -> None:
    file = folder / "ptq_tdq_config.json"
    file.write_text(json.dumps(json.loads(file.read_text())))
    with pytest.raises(ArtifactCorruptError, match="not the one that was written"):
        read_artifact(folder)


def test_an_edited_config_does_not_match_its_hash(folder: Path) -> None:
    file = folder / "ptq_tdq_config.json"
    file.write_text(file.read_text().replace('"method": "tdq"', '"method": "raw"'))
    with pytest.raises(ArtifactCorruptError, match="does not match its config_sha256"):
        read_artifact(folder)


def test_another_schema_version(folder: Path) -> None:
    resign(folder, lambda document: document.update(schema_version=2, new_key="unknown"))
    with pytest.raises(ArtifactMismatchError, match="schema_version 2, this ptq-tdq reads 1; install"):
        read_artifact(folder)


def _in_layer(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda document: document["layers"][0].update(values)


def _in_calibration_set(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda document: document["calibration_set"].update(values)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda d: d.pop("base_model"), "'base_model' is a required property"),
        (lambda d: d.update(schema_version="1"), r"\$\.schema_version"),
        (lambda d: d["time_axis"].update(num_train_timesteps=5.0), "num_train_timesteps: 5.0 is not of type 'integer'"),
        (lambda d: d["time_axis"].update(num_train_timesteps=6), r"'conv' needs scales torch.float32 \[7\]"),
        (lambda d: d["files"].update({"../../secret": "0" * 64}), r"\$\.files"),
        (_in_layer(weight_bits=4.0), "weight_bits"),
        (_in_layer(weight_bits=9), "weight_bits"),
        (_in_layer(weight_bits=5), "81 codes of 5 bits need 81 packed bytes"),
        (_in_layer(kind="linear"), r"the shape \[3, 3, 3, 3\], which no linear has"),
        (_in_layer(splits=[]), "has the channel ranges"),
        (_in_layer(splits=[0, 1, 2]), "does not have 2 channels"),
        (_in_layer(inputs=[]), "interval table of 'conv' belongs to no layer"),
        (_in_layer(extra=1), "'extra' was unexpected"),
        (_in_calibration_set(call=5), r"calibration_set\.call"),
        (_in_calibration_set(classes="zz"), r"calibration_set\.classes"),
        (_in_calibration_set(prompts=[1]), r"calibration_set\.prompts\[0\]"),
        (_in_calibration_set(dtype="load"), r"calibration_set\.dtype"),
        (_in_calibration_set(num_inference_steps=True), r"calibration_set\.num_inference_steps"),
        (lambda d: d.update(choices={}), r"\$\.choices"),
        (lambda d: d["choices"]["calibration"].update(more=1), r"choices\.calibration.*'more' was unexpected"),
        (lambda d: d["base_model"].update(component=["unet"]), r"base_model\.component"),
    ],
)
def test_a_config_that_contradicts_itself_or_the_tensors(
    folder: Path, change: Callable[[dict[str, Any]], None], sentence: str
) -> None:
    resign(folder, change)
    with pytest.raises(ArtifactCorruptError, match=sentence):
        read_artifact(folder)


@pytest.mark.parametrize(
    ("metrics", "place"),
    [
        ({"coverage": "all"}, r"\$\.coverage"),
        ({"mean_bits": {"weights": 4}}, r"\$\.mean_bits"),
        ({"notices": [1]}, r"\$\.notices\[0\]"),
        ({"learned": {"latent_sqnr_db": "a"}}, r"\$\.learned\.latent_sqnr_db"),
        ({"static": {"noise_sqnr_db": {"first": 1.0}}}, r"\$\.static\.noise_sqnr_db"),
        ({"reconstruction": 5}, r"\$\.reconstruction"),
        ({"reconstruction": {"weights": [{"unit": "a", "before": -1, "after": None}]}}, r".*weights\[0\]\.before"),
        ({"finetune": {"held_out": {"before": 1}, "losses": []}}, r"\$\.finetune\.held_out"),
    ],
)
def test_metrics_that_no_command_could_show(
    folder: Path, artifact: Artifact, metrics: dict[str, Any], place: str
) -> None:
    (folder / "metrics.json").write_bytes(encode_json(metrics, "metrics"))
    resign(folder)
    with pytest.raises(ArtifactCorruptError, match=f"metrics are not valid at {place}.*; make"):
        read_artifact(folder)
    with pytest.raises(ArtifactCorruptError, match="metrics are not valid"):
        write_artifact(folder.parent / "other", replace(artifact, metrics=metrics))


def test_one_altered_byte_names_the_file(folder: Path) -> None:
    for name in FILES[1:3] + FILES[4:]:
        data = bytearray((folder / name).read_bytes())
        data[-1] ^= 1
        (folder / name).write_bytes(data)
        with pytest.raises(ArtifactCorruptError, match=f"{name} is not the file that was written"):
            read_artifact(folder)
        data[-1] ^= 1
        (folder / name).write_bytes(data)


@pytest.mark.parametrize("name", ["interval_tables.safetensors", "weights.safetensors"])
@pytest.mark.parametrize("size", [0, 7, 8, 40, -1])
def test_truncated_tensors_with_a_valid_hash(folder: Path, name: str, size: int) -> None:
    (folder / name).write_bytes((folder / name).read_bytes()[:size])
    resign(folder)
    with pytest.raises(ArtifactCorruptError, match=f"{name} cannot be read"):
        read_artifact(folder)


@pytest.mark.parametrize("name", ["interval_tables.safetensors", "weights.safetensors"])
def test_a_file_far_larger_than_its_tensors_is_not_read(folder: Path, name: str) -> None:
    with (folder / name).open("ab") as file:
        file.truncate(3 << 30)
    with pytest.raises(ArtifactCorruptError, match=r"not as long as its header says|it has more than"):
        read_artifact(folder)


def test_tables_far_larger_than_their_quantizers_are_not_read(folder: Path) -> None:
    name, size = "interval_tables.safetensors", 3 << 30
    header = json.dumps({"a.scale": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}).encode()
    with (folder / name).open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
    with pytest.raises(ArtifactCorruptError, match="it has more than"):
        read_artifact(folder)


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        ({"conv__scale": torch.full((6,), torch.nan)}, "'conv' has a scale that is NaN, not positive or too large"),
        ({"conv__scale": torch.zeros(6)}, "'conv' has a scale"),
        ({"conv__scale": -torch.ones(6)}, "'conv' has a scale"),
        ({"conv__scale": torch.full((6,), torch.inf)}, "'conv' has a scale"),
        ({"conv__scale": torch.full((6,), 3e38)}, "'conv' has a scale"),
        ({"conv__scale": torch.ones(5)}, r"'conv' needs scales torch.float32 \[6\], not torch.float32 \[5\]"),
        ({"conv__scale": torch.ones(6).double()}, "not torch.float64"),
        ({"conv__scale": None}, "'conv' does not fit method 'tdq'"),
        ({"conv__zero_point": None}, "'conv.scale' without a zero point"),
        ({"conv__scale": None, "conv__zero_point": None}, "interval table of 'conv' is missing"),
        ({"conv__zero_point": torch.full((6,), 256, dtype=torch.int32)}, "'conv' has a zero point outside 0 to 255"),
        ({"conv__zero_point": torch.full((6,), -1, dtype=torch.int32)}, "zero point outside"),
        ({"conv__zero_point": torch.zeros(1, dtype=torch.int32)}, "'conv' needs zero points"),
        ({"proj__scale": torch.ones(6)}, "'proj' does not fit method 'dynamic'"),
        ({"proj__generator__net": torch.ones(6)}, "'proj' does not fit method 'dynamic'"),
        ({"other__generator__net": torch.ones(6)}, "'other.generator.net' without a zero point"),
        ({"other__zero_point": torch.zeros(1, dtype=torch.int32)}, "'other' belongs to no layer"),
    ],
)
def test_wrong_tables_with_a_valid_hash(folder: Path, tensors: dict[str, torch.Tensor], sentence: str) -> None:
    change_tensors(folder, "interval_tables.safetensors", **tensors)
    with pytest.raises(ArtifactCorruptError, match=sentence):
        read_artifact(folder)


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        ({"conv__weight_codes": None}, "has no 'conv.weight_codes'"),
        ({"conv__weight_shape": None}, "has no 'conv.weight_shape'"),
        ({"conv__weight_codes": torch.zeros(40, dtype=torch.uint8)}, "need 41 packed bytes"),
        ({"conv__weight_shape": torch.tensor([9, 9, 1])}, r"the shape \[9, 9, 1\], which no conv2d has"),
        ({"conv__weight_shape": torch.tensor([2**62, 2**62, 1, 1])}, "packed bytes"),
        ({"conv__weight_shape": torch.tensor([-1, -81, 1, 1])}, "not a list of sizes"),
        ({"conv__weight_scale": torch.ones(4, 1)}, r"'conv' needs scales torch.float32 \[3, 1\]"),
        ({"conv__weight_scale": torch.ones(3)}, "'conv' needs scales"),
        ({"conv__weight_scale": torch.zeros(3, 1)}, "'conv' has a scale"),
        ({"conv__weight_zero_point": torch.full((3, 1), 16, dtype=torch.int32)}, "zero point outside 0 to 15"),
        ({"short__weight_codes": torch.full((10,), 8, dtype=torch.uint8)}, "'short' has codes above 7 at 3 bits"),
        ({"proj__input_divisor": torch.ones(4)}, r"'proj' needs factors torch.float32 \[3\]"),
        ({"proj__input_divisor": torch.tensor([1.0, 3.0, 2.0])}, "'proj' has factors that are no powers of two"),
        ({"proj__input_divisor": torch.tensor([1.0, -2.0, 0.0])}, "no powers of two"),
        ({"proj__input_divisor": torch.tensor([1.0, 2.0**-140, torch.inf])}, "no powers of two near 1"),
        ({"conv__input_divisor": torch.ones(3)}, "'conv' belongs to no linear layer"),
        ({"tied": torch.full((7,), torch.nan)}, "'tied' has NaN or Inf"),
        ({"half": torch.full((7,), torch.inf, dtype=torch.bfloat16)}, "'half' has NaN or Inf"),
    ],
)
def test_wrong_weights_with_a_valid_hash(folder: Path, tensors: dict[str, torch.Tensor], sentence: str) -> None:
    change_tensors(folder, "weights.safetensors", **tensors)
    with pytest.raises(ArtifactCorruptError, match=sentence):
        read_artifact(folder)


@pytest.mark.parametrize(
    ("changes", "error", "sentence"),
    [
        (
            {"metrics": {"psnr_db": float("inf")}},
            ConfigError,
            r"metrics\.json must be plain JSON data without NaN or Inf",
        ),
        ({"metrics": {"x": {1, 2}}}, ConfigError, "plain JSON data"),
        ({"config": {}}, ArtifactCorruptError, "is a required property"),
        ({"config": {"layers": [], "files": {}}}, ConfigError, r"must not have \['files', 'layers'\]"),
        ({"tables": {}}, ArtifactCorruptError, "interval table of 'attn.products.0.softmax' is missing"),
        ({"weight_scale": {}}, ArtifactCorruptError, "quantized weight of 'conv' is missing"),
        ({"float_state": {"conv.weight_scale": torch.ones(1)}}, ArtifactCorruptError, "name of a part"),
    ],
)
def test_an_artifact_that_contradicts_itself_is_not_written(
    tmp_path: Path, artifact: Artifact, changes: dict[str, Any], error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error, match=sentence):
        write_artifact(tmp_path / "out", replace(artifact, **changes))
    assert os.listdir(tmp_path) == []


def test_keys_that_json_would_change_are_not_written(tmp_path: Path, artifact: Artifact) -> None:
    config = {**artifact.config, "model_config": {9: "sorted as a number,", 10: "read as text"}}
    with pytest.raises(ArtifactCorruptError, match="keys that are no text"):
        write_artifact(tmp_path / "out", replace(artifact, config=config))


def test_names_are_unique(artifact: Artifact) -> None:
    conv, short, *_ = artifact.layers
    with pytest.raises(ArtifactCorruptError, match="layer 'conv' is listed 2 times"):
        encode_artifact(replace(artifact, layers=(*artifact.layers, conv)))
    with pytest.raises(ArtifactCorruptError, match="quantizer 'conv' is listed 2 times"):
        encode_artifact(replace(artifact, layers=(conv, replace(short, inputs=conv.inputs))))
