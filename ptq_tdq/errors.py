"""Every error that ptq-tdq raises on purpose.

PtqTdqError
├── UsageError              the request itself is wrong (the command line exits with 2)
│   ├── SchemeError         a bit-width scheme that cannot be parsed
│   └── ConfigError         an unknown or ill-typed choice
├── ModelError              the model cannot be loaded or quantized
│   └── NonFiniteError      NaN or Inf in weights or activations; names the layer and t
├── CalibrationSetError     an empty, unreadable or foreign calibration set
├── TimestepError           a time step outside the interval tables
├── RuntimeUnsupportedError  what the integer runtime cannot run, or not exactly, on this processor
├── ResumeError             an unfinished run that belongs to another model, config or calibration set
├── OutputError             an output path that cannot be written
├── WorkerError             another process of a study, or of a run of several, ended before its work
├── MissingExtraError       an optional package, or a file that it needs, is not there
└── ArtifactError           an artifact directory that cannot be used
    ├── ArtifactCorruptError    missing, truncated or altered files
    └── ArtifactMismatchError   an intact artifact that belongs to another model or version
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "ArtifactCorruptError",
    "ArtifactError",
    "ArtifactMismatchError",
    "CalibrationSetError",
    "ConfigError",
    "MissingExtraError",
    "ModelError",
    "NonFiniteError",
    "OutputError",
    "PtqTdqError",
    "ResumeError",
    "RuntimeUnsupportedError",
    "SchemeError",
    "TimestepError",
    "UsageError",
    "WorkerError",
]


_NO_MEMORY = (
    "can't allocate memory",
    "Cannot allocate memory",
    "failed to map segment",
)  # torch, the system, its loader


class PtqTdqError(Exception):
    """Base of all errors raised on purpose; its text is one sentence for the user."""

    reported = False  # to the other processes of a run


class UsageError(PtqTdqError):
    """The request itself is wrong; nothing was started."""


class SchemeError(UsageError):
    """A bit-width scheme that cannot be parsed or is not supported."""


class ConfigError(UsageError):
    """An unknown or ill-typed choice."""


class ModelError(PtqTdqError):
    """The model cannot be loaded or quantized."""


class NonFiniteError(ModelError):
    """NaN or Inf in weights or activations; the text names the layer and, where known, t."""


class CalibrationSetError(PtqTdqError):
    """An empty, unreadable or foreign calibration set."""


class TimestepError(PtqTdqError):
    """A time step outside the range that the interval tables cover."""


class RuntimeUnsupportedError(PtqTdqError):
    """The integer runtime cannot run a layer, or not exactly on this processor; the text says what to do instead."""


class ResumeError(PtqTdqError):
    """An unfinished run on disk belongs to another model, config or calibration set."""


class OutputError(PtqTdqError):
    """An output path that cannot be written."""


class WorkerError(PtqTdqError):
    """Another process of a study, or of a run of several, ended before its work."""


class MissingExtraError(PtqTdqError):
    """An optional package, or a file that it needs, is not there."""


class ArtifactError(PtqTdqError):
    """An artifact directory that cannot be used."""


class ArtifactCorruptError(ArtifactError):
    """Files of the artifact are missing, truncated or altered."""


class ArtifactMismatchError(ArtifactError):
    """An intact artifact that belongs to another model or to an unknown schema version."""


def first_line(error: BaseException) -> str:
    """What an error of another library says, in one line without a full stop; its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")[:200]


def of_memory(error: BaseException | None) -> bool:
    """Whether an error, or one that it comes from, is of too little memory: torch's is a RuntimeError, for instance."""
    while error is not None:
        if isinstance(error, MemoryError) or any(said in str(error) for said in _NO_MEMORY):
            return True
        error = error.__cause__ or error.__context__
    return False


def printable(value: Any) -> Any:
    """Plain data whose texts cannot move a terminal's cursor or change its title: such characters are spelled out."""
    if isinstance(value, str):
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in value)
    if isinstance(value, dict):
        return {printable(key): printable(item) for key, item in value.items()}
    return [printable(item) for item in value] if isinstance(value, list | tuple) else value
