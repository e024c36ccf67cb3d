"""The full-precision model that an artifact was made from."""

from __future__ import annotations

from ptq_tdq.calib_data import REFERENCE_ID, LoadedModel, load_model
from ptq_tdq.errors import ModelError


def load_original(source: str | None, base: str) -> LoadedModel:
    """The model ``source`` named by the user, else ``base``, the one that the artifact names."""
    try:
        return load_model(source or (None if base == REFERENCE_ID else base))
    except ModelError as error:
        if source:
            raise
        raise ModelError(
            f"The model '{base}' that the artifact was made from cannot be loaded from here; pass --model with its "
            f"folder or hub id ({error})."
        ) from error
