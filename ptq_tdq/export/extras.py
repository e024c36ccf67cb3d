"""Optional packages, imported where they are used."""

from __future__ import annotations

import importlib
from typing import Any

from ptq_tdq.errors import UsageError


def need(package: str, extra: str) -> Any:
    """Import ``package``; raises :class:`UsageError` naming the extra that installs it when it is missing."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise missing(error, extra) from error


def missing(error: ImportError, extra: str) -> UsageError:
    """The sentence for a package that cannot be imported."""
    return UsageError(f"A package is missing ({error}); install it with: pip install 'ptq-tdq[{extra}]'.")
