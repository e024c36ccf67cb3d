"""Where a model's files are: a local folder in one of diffusers' layouts, or a snapshot of a hub repository."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from ptq_tdq.errors import ModelError

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_CONFIGS_AND_WEIGHTS = ["*.json", "*.safetensors"]
_UNET_CLASS = "UNet2DModel"


@dataclass(frozen=True)
class Components:
    """The folders of a model's parts; ``scheduler`` and ``vae`` are None where the model has none."""

    unet: Path
    scheduler: Path | None
    vae: Path | None


def find_folder(source: str) -> Path:
    """Return the local folder of ``source``; a hub id is downloaded, or found in the hub's local cache.

    Raises :class:`ModelError` for a folder or repository that does not exist and for a hub that cannot be reached.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ModelError(f"The model '{source}' is a file; pass the diffusers folder that holds it.")
    if not _HUB_ID.fullmatch(source):
        raise ModelError(
            f"There is no folder '{source}'; pass a local diffusers folder or a hub id such as owner/name."
        )
    try:
        snapshot = Path(snapshot_download(source, allow_patterns=_CONFIGS_AND_WEIGHTS))
        if not any(snapshot.rglob("*.safetensors")):  # older repositories hold PyTorch files only
            snapshot = Path(snapshot_download(source, allow_patterns=["*.json", "*.bin"]))
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"There is neither a local folder nor a public hub repository '{source}'; check the name or pass a folder."
        ) from error
    except (OSError, HfHubHTTPError) as error:
        raise ModelError(
            f"'{source}' is no local folder and the hub could not be reached; pass the path of a diffusers folder."
        ) from error
    return snapshot


def find_components(folder: Path) -> Components:
    """Find the U-Net, the scheduler and the VAE of a pipeline folder or of a bare U-Net folder.

    Parts are in sub-folders named after them or, as in google/ddpm-cifar10-32, at the top level. The scheduler of a
    bare U-Net folder may also be beside it. Raises :class:`ModelError` where there is no UNet2DModel.
    """
    unet = next((place for place in (folder / "unet", folder) if (place / "config.json").is_file()), None)
    if unet is None:
        raise ModelError(
            f"There is no {_UNET_CLASS} in '{folder}': neither config.json nor unet/config.json exists; "
            "pass a folder that diffusers saved."
        )
    found = read_config(unet / "config.json").get("_class_name")
    if found != _UNET_CLASS:
        raise ModelError(
            f"The model in '{unet}' is a {found}, not a {_UNET_CLASS}; pass a folder with a {_UNET_CLASS}."
        )
    places = [folder / "scheduler", folder]
    if unet == folder:
        beside = folder.resolve().parent
        places += [beside / "scheduler", beside]
    scheduler = next((place for place in places if (place / "scheduler_config.json").is_file()), None)
    vae = next((place for place in (folder / "vae", folder / "vqvae") if (place / "config.json").is_file()), None)
    return Components(unet, scheduler, vae)


def read_config(path: Path) -> dict[str, Any]:
    """Read a JSON object; raises :class:`ModelError` for anything else."""
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ModelError(f"The file '{path}' cannot be read as JSON ({error}); copy or download it again.") from error
    if not isinstance(config, dict):
        raise ModelError(f"The file '{path}' is no JSON object; copy or download it again.")
    return config
