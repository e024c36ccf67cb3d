"""Reading files that come from elsewhere: what is no regular file, or far too large, is not read at all."""

from __future__ import annotations

from pathlib import Path
from stat import S_ISREG


def read_file(path: Path, most: int | None = None) -> bytes:
    """The content of a regular file, of at most ``most`` bytes.

    Raises :class:`OSError` for anything else (a pipe or a device may never end), also for a name that the system cannot
    take; :func:`reason` says what is wrong.
    """
    try:
        info = path.stat()
        if not S_ISREG(info.st_mode):
            raise OSError(0, "it is not a regular file")
        if most is not None and info.st_size > most:
            raise OSError(0, f"it has more than {most:,} bytes")
        return path.read_bytes()
    except ValueError as error:  # a NUL in the name
        raise OSError(0, str(error)) from None


def reason(error: Exception) -> str:
    """What is wrong, without the number and the name that the message of an :class:`OSError` repeats."""
    return str(getattr(error, "strerror", None) or error)
