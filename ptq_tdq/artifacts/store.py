"""The artifact on disk: the same artifact always gives the same bytes, and every altered data byte is an error."""

from __future__ import annotations

import os
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ptq_tdq.artifacts.artifact import DERIVED_KEYS, Artifact, IntervalTable, check_artifact
from ptq_tdq.artifacts.document import (
    CONFIG_FILE,
    SCHEMA_VERSION,
    check_document,
    decode_json,
    encode_json,
    find_problem,
    sign,
)
from ptq_tdq.artifacts.packing import pack, unpack
from ptq_tdq.atomic import Contents, check_target, publish_directory, write_file
from ptq_tdq.errors import ArtifactCorruptError, ArtifactError, ConfigError
from ptq_tdq.files import check_tensors, read_file, reason
from ptq_tdq.records import LayerRecord

TABLES_FILE = "interval_tables.safetensors"
WEIGHTS_FILE = "weights.safetensors"
METRICS_FILE = "metrics.json"
CARD_FILE = "README.md"
_DATA_FILES = (TABLES_FILE, WEIGHTS_FILE, METRICS_FILE)  # README.md is prose that its owner may edit: not hashed
_CONTENTS = Contents("an artifact", (*_DATA_FILES, CONFIG_FILE, CARD_FILE))
_MOST_DIMS = 5  # of a weight
MOST_BYTES, MOST_NETWORK = 1 << 26, 1 << 20  # of a file of text, of what finds one interval at run time
_DIVISOR = "input_divisor"
_WEIGHT_PARTS = ("weight_codes", "weight_shape", "weight_scale", "weight_zero_point")


def encode_artifact(artifact: Artifact) -> dict[str, bytes]:
    """Return the content of each file of the artifact by name.

    Raises :class:`ConfigError` for a config or metrics that JSON cannot hold and :class:`ArtifactCorruptError` for an
    artifact that contradicts itself.
    """
    if derived := DERIVED_KEYS & set(artifact.config):
        raise ConfigError(f"The artifact's config must not have {sorted(derived)}: they are made when it is written.")
    layers = [layer.to_dict() for layer in artifact.layers]
    document = {**artifact.config, "schema_version": SCHEMA_VERSION, "layers": layers}
    if problem := find_problem(document):
        raise ArtifactCorruptError(f"The artifact's config is not valid ({problem}); make the artifact again.")
    check_artifact(artifact)
    files = {
        TABLES_FILE: _save(table_tensors(artifact)),
        WEIGHTS_FILE: _save(weight_tensors(artifact)),
        METRICS_FILE: encode_json(artifact.metrics, METRICS_FILE),
    }
    hashes = {name: sha256(data).hexdigest() for name, data in files.items()}
    files[CONFIG_FILE] = encode_json(sign({**document, "files": hashes}), CONFIG_FILE)
    files[CARD_FILE] = artifact.card.encode("utf-8")
    return files


def write_artifact(path: str | Path, artifact: Artifact, overwrite: bool = False) -> None:
    """Write ``artifact`` as the directory ``path``, all of it or nothing.

    ``overwrite`` replaces an existing artifact, never a directory with anything else in it. Raises what
    :func:`encode_artifact` raises, and :class:`OutputError` when the directory cannot be written.
    """
    files = encode_artifact(artifact)
    with publish_directory(path, _CONTENTS if overwrite else None) as folder:
        for name, data in files.items():
            write_file(folder / name, data)


def check_output(path: str | Path, overwrite: bool = False) -> None:
    """Raise :class:`OutputError` for a directory that :func:`write_artifact` would refuse, before any work is done."""
    check_target(path, _CONTENTS if overwrite else None)


def read_artifact(path: str | Path) -> Artifact:
    """Read the artifact in the directory ``path``; every tensor is on the CPU and independent of the files.

    Raises :class:`ArtifactError` for a path that holds no artifact, :class:`ArtifactCorruptError` for missing,
    truncated, altered or contradictory files, and :class:`ArtifactMismatchError` for another schema version.
    """
    root = Path(path)
    if not os.path.isdir(root):
        raise ArtifactError(f"'{root}' is not a directory; give the path of a ptq-tdq artifact.")
    if not os.path.exists(root / CONFIG_FILE):
        raise ArtifactError(f"'{root}' has no {CONFIG_FILE}; give the path of a ptq-tdq artifact.")
    document = decode_json(_read(root / CONFIG_FILE), CONFIG_FILE)
    check_document(document)
    most = {TABLES_FILE: _most_of_tables(document)}
    files = {name: _read(root / name, most.get(name)) for name in _DATA_FILES}
    for name, data in files.items():
        if sha256(data).hexdigest() != document["files"][name]:
            raise ArtifactCorruptError(f"{name} is not the file that was written; copy or make the artifact again.")
    return assemble(
        document,
        _load(files[WEIGHTS_FILE], WEIGHTS_FILE),
        _load(files[TABLES_FILE], TABLES_FILE),
        decode_json(files[METRICS_FILE], METRICS_FILE),
        _read(root / CARD_FILE).decode("utf-8", errors="replace"),
    )


def assemble(
    document: dict[str, Any], weights: dict[str, Tensor], tables: dict[str, Tensor], metrics: dict[str, Any], card: str
) -> Artifact:
    """The artifact of a document that fits the schema, checked; the tensors leave their dictionaries.

    Raises :class:`ArtifactCorruptError` where document and tensors contradict each other.
    """
    layers = tuple(LayerRecord.from_dict(layer) for layer in document["layers"])
    parts = {layer.name: _take_weight(weights, layer) for layer in layers if layer.weight_bits is not None}
    divisors = {name: weights.pop(key) for name in parts if (key := f"{name}.{_DIVISOR}") in weights}
    artifact = Artifact(
        config={key: value for key, value in document.items() if key not in DERIVED_KEYS},
        layers=layers,
        tables=_tables(tables),
        weight_codes={name: codes for name, (codes, _, _) in parts.items()},
        weight_scale={name: scale for name, (_, scale, _) in parts.items()},
        weight_zero_point={name: zero_point for name, (_, _, zero_point) in parts.items()},
        float_state=weights,  # what the quantized layers have left
        metrics=metrics,
        card=card,
        divisors=divisors,
    )
    check_artifact(artifact)
    return artifact


def table_tensors(artifact: Artifact) -> dict[str, Tensor]:
    """The interval tables by their keys in a file."""
    return {key: value for name, table in artifact.tables.items() for key, value in table.tensors(name).items()}


def _tables(tensors: dict[str, Tensor]) -> dict[str, IntervalTable]:
    names = [key.removesuffix(".zero_point") for key in tensors if key.endswith(".zero_point")]
    tables = {name: IntervalTable.take(name, tensors) for name in names}
    for key in tensors:
        raise ArtifactCorruptError(f"{TABLES_FILE} has '{key}' without a zero point; make the artifact again.")
    return tables


def weight_tensors(artifact: Artifact) -> dict[str, Tensor]:
    """All other tensors by their keys in a file, codes packed."""
    tensors = {}
    for layer in artifact.layers:
        if layer.weight_bits is not None:
            codes = artifact.weight_codes[layer.name]
            tensors[f"{layer.name}.weight_codes"] = pack(codes, layer.weight_bits)
            tensors[f"{layer.name}.weight_shape"] = torch.tensor(codes.shape)  # packed codes no longer tell it
            tensors[f"{layer.name}.weight_scale"] = artifact.weight_scale[layer.name]
            tensors[f"{layer.name}.weight_zero_point"] = artifact.weight_zero_point[layer.name]
            if layer.name in artifact.divisors:
                tensors[f"{layer.name}.{_DIVISOR}"] = artifact.divisors[layer.name]
    for name in tensors.keys() & artifact.float_state.keys():
        raise ArtifactCorruptError(f"The tensor '{name}' has the name of a part of a quantized weight; rename it.")
    return {**tensors, **artifact.float_state}


def _take_weight(tensors: dict[str, Tensor], layer: LayerRecord) -> tuple[Tensor, Tensor, Tensor]:
    """Remove the parts of the layer's weight from ``tensors``: codes in the weight's shape, scale, zero point."""
    try:
        parts = [tensors.pop(f"{layer.name}.{part}") for part in _WEIGHT_PARTS]
    except KeyError as error:
        raise ArtifactCorruptError(f"{WEIGHTS_FILE} has no {error}; make the artifact again.") from error
    packed, shape, scale, zero_point = parts
    if shape.dtype != torch.int64 or shape.ndim != 1 or len(shape) > _MOST_DIMS or not bool((shape > 0).all()):
        raise ArtifactCorruptError(
            f"The weight shape of '{layer.name}' is not a list of sizes; make the artifact again."
        )
    return unpack(packed, layer.weight_bits or 0, shape.tolist()), scale, zero_point


def _save(tensors: dict[str, Tensor]) -> bytes:
    return save(copies(tensors), metadata={"format": "pt"})  # one key: several have a random order


def copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU and in one order; each has memory of its own, since safetensors refuses what is shared."""
    return {name: tensors[name].detach().cpu().contiguous().clone() for name in sorted(tensors)}


def _load(data: bytes, name: str) -> dict[str, Tensor]:
    try:
        return load(data)
    # A well-formed header may still hold a dtype or a size that torch does not know.
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise ArtifactCorruptError(f"{name} is not a safetensors file ({error}); make the artifact again.") from error


def _most_of_tables(document: dict[str, Any]) -> int:
    """Bytes that the tables of a document can have: two numbers of four bytes for each t, or a small network."""
    quantizers = sum(len(layer["inputs"]) for layer in document["layers"])
    steps = int(document["time_axis"]["num_train_timesteps"]) + 1
    return MOST_BYTES + quantizers * (8 * steps + MOST_NETWORK)


def _read(path: Path, most: int | None = None) -> bytes:
    try:
        if path.suffix in (".json", ".md"):
            return read_file(path, MOST_BYTES)
        check_tensors(path, most)
        return read_file(path)
    except OSError as error:
        raise ArtifactCorruptError(
            f"{path.name} cannot be read ({reason(error)}); copy or make the artifact again."
        ) from error
