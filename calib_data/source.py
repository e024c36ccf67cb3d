"""Where a model's files are: a local folder in one of diffusers' layouts, or a snapshot of a hub repository."""

from __future__ import annotations

import inspect
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from ptq_tdq.errors import ModelError
from ptq_tdq.files import read_file, reason
from ptq_tdq.structure import diffusers_class
from ptq_tdq.timeaxis import usual_name

PIPELINE_FILE = "model_index.json"
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_CONFIGS_AND_WEIGHTS = ["*.json", "*.safetensors"]
_MOST_BYTES = 1 << 24  # of a configuration
_PARTS = ("unet", "transformer")  # where a folder without a pipeline file keeps its denoiser


@dataclass(frozen=True)
class Parts:
    """The folders of a model's parts; None for what the model has not.

    ``pipeline`` is the folder with the pipeline file, ``component`` the name of the denoiser in it.
    """

    denoiser: Path
    component: str | None
    scheduler: Path | None
    vae: Path | None
    pipeline: Path | None


def find_folder(source: str) -> Path:
    """Return the local folder of ``source``; a hub id is downloaded, or found in the hub's local cache.

    Raises :class:`ModelError` for a folder or repository that does not exist and for a hub that cannot be reached.
    """
    folder = Path(source).expanduser()
    if source and os.path.isdir(folder):  # unlike Path's, these are false for a name that the system cannot take
        return folder
    if source and os.path.exists(folder):
        raise ModelError(f"The model '{source}' is a file; pass the diffusers folder that holds it.")
    if not _HUB_ID.fullmatch(source):
        raise ModelError(
            f"There is no folder '{source[:200]}'; pass a local diffusers folder or a hub id such as owner/name."
        )
    try:
        found = Path(snapshot_download(source, allow_patterns=["*.json"]))
        if (found / PIPELINE_FILE).is_file():  # the files of its components, each in one form
            from diffusers import DiffusionPipeline

            return Path(DiffusionPipeline.download(source, use_safetensors=True))
        return Path(snapshot_download(source, allow_patterns=_CONFIGS_AND_WEIGHTS))
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"There is neither a local folder nor a public hub repository '{source}'; check the name or pass a folder."
        ) from error
    except (OSError, HfHubHTTPError) as error:
        raise ModelError(
            f"'{source}' is no local folder and the hub could not be reached; pass the path of a diffusers folder."
        ) from error


def find_parts(folder: Path, component: str | None = None) -> Parts:
    """Find the denoiser, and what stands around it, in the folder of a pipeline or of a bare denoiser.

    In a pipeline the denoiser is the component whose forward pass takes a time step; ``component`` names one of
    several. Without a pipeline file, parts are in sub-folders named after them or at the top level, and the scheduler
    of a bare denoiser may be beside it.

    Raises :class:`ModelError` where there is no denoiser, none of that name, or no name to choose among several.
    """
    if (folder / PIPELINE_FILE).is_file():
        return _of_pipeline(folder, component)
    known = [name for name in _PARTS if (folder / name / "config.json").is_file()]
    bare = (folder / "config.json").is_file()  # it is the denoiser, whatever its name is in a pipeline
    if component is not None and component not in known and not bare:
        raise ModelError(_no_component(folder, component, known))
    name = component if component in known else next(iter(known), None)
    place = folder / name if name else folder
    if not (place / "config.json").is_file():
        raise ModelError(
            f"There is no denoiser in '{folder}': neither {PIPELINE_FILE} nor config.json nor one in "
            f"{' or '.join(_PARTS)} exists; pass a folder that diffusers saved."
        )
    found = read_config(place / "config.json").get("_class_name")
    if not takes_time(found):
        raise ModelError(
            f"The model in '{place}' is a {found}, which takes no time step; pass a folder with a denoiser, "
            "such as a UNet2DConditionModel or a transformer."
        )
    places = [folder / "scheduler", folder]
    if place == folder:
        beside = folder.resolve().parent
        places += [beside / "scheduler", beside]
    scheduler = next((p for p in places if (p / "scheduler_config.json").is_file()), None)
    return Parts(place, name, scheduler, _vae(folder), None)


def _of_pipeline(folder: Path, component: str | None) -> Parts:
    index = read_config(folder / PIPELINE_FILE)
    entries = {name: e for name, e in index.items() if isinstance(e, list) and len(e) == 2 and e[1] is not None}
    denoisers = [name for name, (_, cls) in entries.items() if takes_time(cls)]
    if not denoisers:
        raise ModelError(
            f"The pipeline in '{folder}' has no component that takes a time step, so there is no denoiser to quantize."
        )
    if component is not None and component not in denoisers:
        raise ModelError(_no_component(folder, component, denoisers))
    if component is None and len(denoisers) > 1:
        raise ModelError(
            f"The pipeline in '{folder}' has several denoisers ({', '.join(denoisers)}); "
            "name one as component and quantize them one at a time."
        )
    name = component or denoisers[0]
    place = folder / name if (folder / name).is_dir() else folder  # older ones keep it at the top level
    scheduler = next((p for p in (folder / "scheduler", folder) if (p / "scheduler_config.json").is_file()), None)
    return Parts(place, name, scheduler, _vae(folder), folder)


def _no_component(folder: Path, component: str, known: list[str]) -> str:
    there = f"it has {', '.join(known)}" if known else "it has none"
    return f"'{folder}' has no denoiser named {component!r}; {there}."


def _vae(folder: Path) -> Path | None:
    return next((p for p in (folder / "vae", folder / "vqvae") if (p / "config.json").is_file()), None)


def takes_time(name: Any) -> bool:
    """Whether the class of diffusers that is called ``name`` is a model of x and a time step."""
    cls = diffusers_class(name)
    return cls is not None and usual_name(inspect.signature(cls.forward).parameters) is not None


def read_config(path: Path) -> dict[str, Any]:
    """Read a JSON object; raises :class:`ModelError` for anything else."""
    try:
        config = json.loads(read_file(path, _MOST_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(
            f"The file '{path}' cannot be read as JSON ({reason(error)}); copy or download it again."
        ) from error
    if not isinstance(config, dict):
        raise ModelError(f"The file '{path}' is no JSON object; copy or download it again.")
    return config
