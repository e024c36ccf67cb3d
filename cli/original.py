"""The full-precision model that an artifact was made from."""

from __future__ import annotations

from typing import Any

import click
import torch
from click.core import ParameterSource

from ptq_tdq.artifacts import Artifact
from ptq_tdq.calib_data import EMBEDDED, LoadedModel, load_model
from ptq_tdq.errors import ModelError
from ptq_tdq.structure import check_built, diffusers_class

_IN_PYTHON = "; use it in Python, where load_quantized, export_onnx and finetune take an instance of it."
_NAMES = {embedded.id: name for name, embedded in EMBEDDED.items()}


def load_original(source: str | None, stored: Artifact, **given: Any) -> LoadedModel:
    """The model ``source`` named by the user, else the one that the artifact names.

    ``given`` are the arguments of :func:`~ptq_tdq.load_model`. What the user has not named is as it was in calibration:
    component, dtype, prompts or classes, and the pipeline's arguments. Raises what ``load_model`` raises, and
    :func:`check_class`.
    """
    base = stored.config["base_model"]
    check_class(stored)
    given = {**given, **_as_in_calibration(stored, given)}
    try:
        return load_model(source or _NAMES.get(base["id"], base["id"]), **given)
    except ModelError as error:
        if source:
            raise
        raise ModelError(
            f"The model '{base['id']}' that the artifact was made from cannot be loaded from here; pass --model with "
            f"its folder or hub id ({error})."
        ) from error


def check_class(stored: Artifact) -> None:
    """Refuse an artifact of a model that commands cannot build.

    Raises :class:`ModelError` for a class that diffusers does not have, and what
    :func:`~ptq_tdq.structure.check_built` raises.
    """
    name = stored.config["model_config"].get("_class_name")
    if diffusers_class(name) is None:
        raise ModelError(f"The artifact is of a {name!r}, which diffusers does not have{_IN_PYTHON}")
    check_built(stored)


def _as_in_calibration(stored: Artifact, given: dict[str, Any]) -> dict[str, Any]:
    recipe = stored.config["calibration_set"]  # without these keys where a user recorded the calls
    found = {key: recipe.get(key) for key in ("prompts", "classes") if given.get(key) is None}
    found["call"] = {**recipe.get("call", {}), **(given.get("call") or {})}
    if given.get("component") is None:
        found["component"] = stored.config["base_model"].get("component")
    if "dtype" in recipe and not _named("dtype"):
        found["dtype"] = getattr(torch, recipe["dtype"])
    return found


def _named(option: str) -> bool:
    """Whether the user gave an option of the running command, which has a default."""
    context = click.get_current_context(silent=True)
    return context is not None and context.get_parameter_source(option) is ParameterSource.COMMANDLINE


def quiet_schedulers() -> None:
    """Schedulers report on stderr what they adjust; the user asked for something else."""
    from diffusers.utils import logging

    logging.set_verbosity_error()
