"""The user's cache folder: calibration sets and built native code."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable
from pathlib import Path

from ptq_tdq.errors import OutputError

_DIGEST = hashlib.sha256().digest_size


def cache_folder() -> Path:
    """Return ``$PTQ_TDQ_CACHE``, or ``~/.cache/ptq-tdq`` where that is not set.

    Raises :class:`OutputError` for a user without a home folder.
    """
    folder = os.environ.get("PTQ_TDQ_CACHE")
    try:
        return Path(folder) if folder else Path.home() / ".cache" / "ptq-tdq"
    except RuntimeError as error:
        raise OutputError("There is no home folder for the cache; set PTQ_TDQ_CACHE to a folder.") from error


# Cached code runs in the user's name. Whoever may write its folder may write any hash beside it, so what protects it is
# who may write: the folder and the file belong to the user or to root, and to nobody else's pen. The hash at the file's
# end is there for damage. The caller runs the very bytes that were checked, so nothing can be exchanged in between.


def private_folder(path: Path) -> Path:
    """Make ``path`` a folder that only this user may write; raises OSError where it is anything else."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir(mode=0o700, exist_ok=True)
    if not _is_ours(path.lstat(), stat.S_ISDIR):
        raise PermissionError(f"others may write the folder {path}")
    return path


def read_private(path: Path) -> bytes | None:
    """What :func:`with_digest` was given for the file ``path``, or None where it is not whole or not surely ours."""
    try:
        # By descriptors: the folder and the file that are examined are those that are read.
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            file = os.open(path.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
            with open(file, "rb") as opened:
                if not _is_ours(os.fstat(folder), stat.S_ISDIR) or not _is_ours(os.fstat(file), stat.S_ISREG):
                    return None
                data = opened.read()
        finally:
            os.close(folder)
    except OSError:
        return None
    content, digest = data[:-_DIGEST], data[-_DIGEST:]
    return content if hashlib.sha256(content).digest() == digest else None


def with_digest(content: bytes) -> bytes:
    """``content`` with its SHA-256 at the end, as :func:`read_private` reads it."""
    return content + hashlib.sha256(content).digest()


def _is_ours(found: os.stat_result, kind: Callable[[int], bool]) -> bool:
    writable_by_others = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return kind(found.st_mode) and found.st_uid in (os.getuid(), 0) and not writable_by_others
