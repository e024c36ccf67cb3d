"""Optional packages, imported where they are used."""

from __future__ import annotations

import importlib
from typing import Any

from ptq_tdq.errors import MissingExtraError


def need(package: str, extra: str) -> Any:
    """Import ``package``; raises :class:`MissingExtraError` naming the extra that installs it when it is missing."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise missing(error, extra) from error


def missing(error: ImportError, extra: str) -> MissingExtraError:
    """The sentence for a package that cannot be imported."""
    return MissingExtraError(f"A package is missing ({error}); install it with: pip install 'ptq-tdq[{extra}]'.")
