"""From an artifact directory, or a hub id of one, to a module that runs."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import diffusers
import torch
from huggingface_hub import snapshot_download

from ptq_tdq.artifacts import CONFIG_FILE, read_artifact
from ptq_tdq.errors import ArtifactError, ArtifactMismatchError, ConfigError
from ptq_tdq.quantized_model import QuantizedModel


def load_quantized(
    source: str | Path, *, backend: Literal["simulated"] = "simulated", device: str | torch.device = "cpu"
) -> QuantizedModel:
    """Read an artifact into a module with the signature of the original model (``pipe.unet = ...``).

    ``backend`` "simulated" computes in floating point with values on the integer grid; it equals the calibrated model
    bit for bit.

    Raises :class:`~ptq_tdq.errors.ArtifactError` (missing, damaged, of an unknown version or model class) and
    :class:`~ptq_tdq.errors.ConfigError` for an unknown backend.
    """
    if backend != "simulated":
        raise ConfigError(f"The backend must be 'simulated' (computes in floating point). Got {backend!r} instead.")
    artifact = read_artifact(_folder(source))
    name = artifact.config["model_config"].get("_class_name")
    cls = getattr(diffusers, str(name), None)
    if cls is None or not hasattr(cls, "from_config"):
        raise ArtifactMismatchError(f"The artifact is of a {name!r}, which this version of diffusers does not have.")
    return QuantizedModel.from_artifact(cls.from_config(artifact.config["model_config"]), artifact).to(device)


def _folder(source: str | Path) -> Path:
    folder = Path(source)
    if folder.exists() or not isinstance(source, str) or source.count("/") != 1 or source.startswith((".", "/")):
        return folder
    try:
        return Path(snapshot_download(source, allow_patterns=[CONFIG_FILE, "*.safetensors", "*.json", "README.md"]))
    except Exception as error:  # the hub client raises many unrelated types
        reason = str(error).splitlines()[0]
        raise ArtifactError(f"{source} is neither a folder here nor an artifact on the hub ({reason}).") from None
