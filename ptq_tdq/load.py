"""From an artifact directory, or a hub id of one, to a module that runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args, overload

import torch
from torch import nn

from ptq_tdq.artifacts import CONFIG_FILE, Artifact, read_artifact
from ptq_tdq.errors import ArtifactError, ConfigError, first_line
from ptq_tdq.processor import check_device
from ptq_tdq.quantized_model import QuantizedModel
from ptq_tdq.structure import building, hollow_model

if TYPE_CHECKING:  # it knows diffusers' blocks, whose import takes seconds
    from ptq_tdq.runtime import IntegerModel

Backend = Literal["simulated", "integer"]
Given = str | Path | Artifact | QuantizedModel
"""What a function takes as an artifact."""


@overload
def load_quantized(
    source: str | Path,
    *,
    model: nn.Module | None = None,
    backend: Literal["simulated"] = "simulated",
    device: str | torch.device = "cpu",
) -> QuantizedModel: ...


@overload
def load_quantized(
    source: str | Path,
    *,
    model: nn.Module | None = None,
    backend: Literal["integer"],
    device: str | torch.device = "cpu",
) -> IntegerModel: ...


@overload
def load_quantized(
    source: str | Path,
    *,
    model: nn.Module | None = None,
    backend: Backend,
    device: str | torch.device = "cpu",
) -> QuantizedModel | IntegerModel: ...


def load_quantized(
    source: str | Path,
    *,
    model: nn.Module | None = None,
    backend: Backend = "simulated",
    device: str | torch.device = "cpu",
) -> QuantizedModel | IntegerModel:
    """Read an artifact into a module with the signature of the original model (``pipe.unet = ...``).

    ``backend`` "simulated" computes in floating point with values on the integer grid; it equals the calibrated model
    bit for bit. "integer" computes convolutions and linears with integers, on the CPU, and is the fast one; its
    ``facts`` say what runs. A class that is not diffusers' own is given as ``model``, with any weights: it is copied,
    and the copy's weights are those of the artifact.

    No content of the files runs as code or is trusted: every tensor is held against the model's structure first.

    Raises :class:`~ptq_tdq.errors.ArtifactError` (missing, damaged, of another version, or of no model that fits),
    :class:`~ptq_tdq.errors.ConfigError` for an argument that is none, such as an unknown backend or a missing device,
    :class:`~ptq_tdq.errors.ModelError` for a ``model`` whose lazy layers were never called, and
    :class:`~ptq_tdq.errors.RuntimeUnsupportedError` for what cannot run in integers on this processor.
    """
    if backend not in get_args(Backend):
        raise ConfigError(f"The backend must be one of {', '.join(get_args(Backend))}. Got {backend!r} instead.")
    check_device(device)
    if backend == "integer" and torch.device(device).type != "cpu":
        raise ConfigError(f'The backend "integer" runs on the CPU only. Got device {str(device)!r} instead.')
    artifact = find_artifact(source)
    if backend == "integer":
        from ptq_tdq.runtime import IntegerModel

        with building():
            return IntegerModel(hollow_model(artifact, model), artifact)  # the float weights are never made
    return build_quantized(artifact, model).to(device)


def build_quantized(artifact: Artifact, model: nn.Module | None = None) -> QuantizedModel:
    """The simulated model of an artifact in memory; raises :class:`ArtifactMismatchError` where they do not fit."""
    with building():
        return QuantizedModel.from_artifact(hollow_model(artifact, model), artifact)


def find_artifact(source: str | Path) -> Artifact:
    """The artifact in a folder, or of a hub id; raises what :func:`~ptq_tdq.artifacts.read_artifact` raises."""
    if not isinstance(source, str | Path):
        raise ConfigError(f"An artifact is read from a folder or a hub id. Got a {type(source).__name__} instead.")
    return read_artifact(_folder(source))


def as_artifact(given: Given) -> Artifact:
    """The artifact of a folder, of a hub id, or of what :func:`~ptq_tdq.calibrate` gave, or itself.

    Raises :class:`ConfigError` for anything else, and what :func:`find_artifact` raises.
    """
    if isinstance(given, QuantizedModel):
        return given.to_artifact()
    if isinstance(given, str | Path):
        return find_artifact(given)
    if not isinstance(given, Artifact):
        raise ConfigError(
            "artifact must be a folder, a hub id, or what ptq_tdq.calibrate gives. "
            f"Got a {type(given).__name__} instead."
        )
    return given


def _folder(source: str | Path) -> Path:
    folder = Path(source)
    if folder.exists() or not isinstance(source, str) or source.count("/") != 1 or source.startswith((".", "/")):
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=[CONFIG_FILE, "*.safetensors", "*.json", "README.md"]))
    except Exception as error:  # the hub client raises many unrelated types
        said = first_line(error)
        raise ArtifactError(f"{source} is neither a folder here nor an artifact on the hub ({said}).") from None
