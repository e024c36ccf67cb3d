"""ptq_tdq_config.json as a document: one canonical text, its own hash, and the published JSON Schema."""

from __future__ import annotations

import json
from hashlib import sha256
from importlib.resources import files
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match
from jsonschema.validators import extend

from ptq_tdq.errors import ArtifactCorruptError, ArtifactMismatchError, ConfigError

SCHEMA_VERSION = 1
CONFIG_FILE = "ptq_tdq_config.json"


def schema() -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of ptq_tdq_config.json."""
    text = files("ptq_tdq.artifacts").joinpath("schema.json").read_text(encoding="utf-8")
    loaded: dict[str, Any] = json.loads(text)
    return loaded


def encode_json(value: Any, name: str) -> bytes:
    """Write a JSON value in its one text; raises :class:`ConfigError` for what JSON cannot hold (NaN, Inf)."""
    try:
        text = json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        return text.encode("utf-8")
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{name} must be plain JSON data without NaN or Inf ({error}).") from error


def decode_json(data: bytes, name: str) -> dict[str, Any]:
    """Inverse of :func:`encode_json` for objects; any other byte, even a space, is an :class:`ArtifactCorruptError`."""
    try:
        value = json.loads(data.decode("utf-8"))
        if not isinstance(value, dict):
            raise ValueError("it is not an object")
        if encode_json(value, name) != data:
            raise ValueError("its text is not the one that was written")
    except (ValueError, RecursionError, ConfigError) as error:
        raise ArtifactCorruptError(f"{name} is damaged ({error}); copy or make the artifact again.") from error
    return value


def sign(document: dict[str, Any]) -> dict[str, Any]:
    """``document`` with "config_sha256", the hash of its canonical text without that key."""
    unsigned = {key: value for key, value in document.items() if key != "config_sha256"}
    return {**unsigned, "config_sha256": sha256(encode_json(unsigned, CONFIG_FILE)).hexdigest()}


def check_document(document: dict[str, Any]) -> None:
    """Check version, hash and schema of ``document``, in this order.

    Raises :class:`ArtifactMismatchError` for another schema version, :class:`ArtifactCorruptError` for anything else.
    """
    check_version(document)
    if document != sign(document):
        raise ArtifactCorruptError(f"{CONFIG_FILE} does not match its config_sha256; copy or make the artifact again.")
    if problem := _schema_problem(document):
        raise ArtifactCorruptError(f"{CONFIG_FILE} is not valid at {problem}; make the artifact again.")


def check_version(document: dict[str, Any]) -> None:
    """Raise :class:`ArtifactMismatchError` for a document of another schema version."""
    version = document.get("schema_version")
    if type(version) is int and version != SCHEMA_VERSION:
        raise ArtifactMismatchError(
            f"The artifact has schema_version {version}, this ptq-tdq reads {SCHEMA_VERSION}; "
            f"install a ptq-tdq that reads schema_version {version}."
        )


def check_draft(config: dict[str, Any], layers: list[dict[str, Any]]) -> None:
    """Check all of a document that is known before its data files exist; raises :class:`ConfigError`.

    ``config`` is the document without the keys that are made when it is written.
    """
    if problem := find_problem({**config, "schema_version": SCHEMA_VERSION, "layers": layers}):
        raise ConfigError(f"No artifact could say so: {problem}; change that choice.")


def find_problem(document: dict[str, Any]) -> str | None:
    """What stands against a document whose files and hash are not there yet, or None."""
    empty = dict.fromkeys(schema()["properties"]["files"]["required"], sha256(b"").hexdigest())
    text = encode_json(sign({**document, "files": empty}), CONFIG_FILE)
    plain = json.loads(text)
    return _schema_problem(plain) if encode_json(plain, CONFIG_FILE) == text else "keys that are no text"


def metrics_problem(metrics: dict[str, Any]) -> str | None:
    """What the schema has against the content of metrics.json, and where; or None."""
    return _schema_problem(metrics, {"$ref": "#/$defs/metrics", "$defs": schema()["$defs"]})


def _schema_problem(document: dict[str, Any], known: dict[str, Any] | None = None) -> str | None:
    """What the schema has against a document, and where; or None."""
    # JSON Schema calls 4.0 an integer; Python's shifts and shapes do not.
    types = Draft202012Validator.TYPE_CHECKER.redefine("integer", lambda _, value: type(value) is int)
    error = best_match(extend(Draft202012Validator, type_checker=types)(known or schema()).iter_errors(document))
    return None if error is None else f"{error.json_path}: {error.message[:200]}"
