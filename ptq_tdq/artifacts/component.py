"""An artifact as one JSON document and one set of tensors, for a folder whose other files belong to another program."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ptq_tdq.artifacts.artifact import Artifact
from ptq_tdq.artifacts.document import (
    CONFIG_FILE,
    SCHEMA_VERSION,
    check_version,
    decode_json,
    encode_json,
    find_problem,
)
from ptq_tdq.artifacts.store import TABLES_FILE, assemble, copies, table_tensors, weight_tensors
from ptq_tdq.errors import ArtifactCorruptError, ConfigError

_TABLES = TABLES_FILE.removesuffix("safetensors")  # before the keys of interval tables


def component_document(artifact: Artifact) -> dict[str, Any]:
    """The document of ``artifact`` as plain JSON data, with its metrics and without the model's configuration."""
    config = {key: value for key, value in artifact.config.items() if key != "model_config"}
    layers = [layer.to_dict() for layer in artifact.layers]
    document = {**config, "schema_version": SCHEMA_VERSION, "layers": layers, "metrics": artifact.metrics}
    return decode_json(encode_json(document, CONFIG_FILE), CONFIG_FILE)


def component_tensors(artifact: Artifact) -> dict[str, Tensor]:
    """All tensors of ``artifact`` by their keys in one file, with memory of their own."""
    tables = {_TABLES + key: tensor for key, tensor in table_tensors(artifact).items()}
    return copies(weight_tensors(artifact) | tables)


def decode_component(document: Any, tensors: dict[str, Tensor], model_config: dict[str, Any]) -> Artifact:
    """Inverse of :func:`component_document` and :func:`component_tensors`, with the model's own configuration.

    Raises :class:`ArtifactCorruptError` for what contradicts the schema or itself, and
    :class:`ArtifactMismatchError` for another schema version.
    """
    if not isinstance(document, dict):
        raise ArtifactCorruptError("The quantization has no document; make the folder again.")
    check_version(document)
    document = {**document, "model_config": model_config}
    metrics = document.pop("metrics", None)
    try:
        problem = find_problem(document)
    except ConfigError as error:
        problem = str(error)
    if problem or not isinstance(metrics, dict):
        raise ArtifactCorruptError(f"The quantization is not valid ({problem or 'no metrics'}); make the folder again.")
    tables = {key.removeprefix(_TABLES): value for key, value in tensors.items() if key.startswith(_TABLES)}
    weights = {key: value for key, value in tensors.items() if not key.startswith(_TABLES)}
    return assemble(document, weights, tables, metrics, card="")
