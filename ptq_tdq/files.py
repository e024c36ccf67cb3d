"""Files that come from elsewhere: what is no regular file, or far too large, is not read; who holds one is known."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from stat import S_ISREG
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from PIL import Image
if sys.platform != "win32":
    import fcntl

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")  # whatever an ending promises: Pillow starts programs for some others
_MOST_HEADER = 100_000_000  # bytes, the limit of safetensors itself


def read_file(path: Path, most: int | None = None) -> bytes:
    """The content of a regular file, of at most ``most`` bytes.

    Raises :class:`OSError` for anything else (a pipe or a device may never end), also for a name that the system cannot
    take; :func:`reason` says what is wrong.
    """
    with _opened(path, most) as file:
        return file.read()


def check_file(path: Path, most: int | None = None) -> int:
    """The size of a regular file of at most ``most`` bytes; raises as :func:`read_file` does."""
    try:
        return _size(path.stat(), most)
    except ValueError as error:  # a NUL in the name
        raise OSError(0, str(error)) from None


@contextmanager
def _opened(path: Path, most: int | None) -> Iterator[BinaryIO]:
    """A regular file, to be read; raises as :func:`read_file` does, also for what takes its place meanwhile."""
    check_file(path, most)  # opening alone may do something to a device
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))) as file:
        _size(os.fstat(file.fileno()), most)
        yield file


def _size(found: os.stat_result, most: int | None) -> int:
    if not S_ISREG(found.st_mode):
        raise OSError(0, "it is not a regular file")
    if most is not None and found.st_size > most:
        raise OSError(0, f"it has more than {most:,} bytes")
    return found.st_size


def check_tensors(path: Path, most: int | None = None) -> None:
    """Raise :class:`OSError` for a file that is not as long as its safetensors header says, or has over ``most`` bytes.

    Nothing but the header is read.
    """
    with _opened(path, most) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if length > min(size, _MOST_HEADER):
            raise OSError(0, "it has no header of tensors")
        try:
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            whole = size == 8 + length + max(ends, default=0)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
            raise OSError(0, "it has no header of tensors") from None
    if not whole:
        raise OSError(0, "it is not as long as its header says")


def find_images(folder: Path) -> list[Path]:
    """What in a folder and its sub-folders is called as images are and is not hidden, in the order of the names."""
    found = (path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_ENDINGS and not path.is_dir())
    return sorted(path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts))


def read_image(path: Path) -> Image.Image:
    """An image file as it is to be seen, 8 bits of red, green and blue; raises :class:`OSError` for what is none.

    Where it is transparent it has the colours that lie below.
    """
    import numpy as np
    from PIL import Image, ImageOps

    check_file(path)
    try:
        with (
            warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning),
            Image.open(path, formats=_IMAGE_FORMATS) as image,
        ):  # Pillow refuses what has twice as many pixels as it warns of, and clips 16 bits to 8
            eight = Image.fromarray(np.uint8(np.asarray(image) // 257)) if image.mode.startswith("I") else image
            return ImageOps.exif_transpose(eight).convert("RGB")
    except Exception as error:  # decoders raise many unrelated types
        raise OSError(0, reason(error)) from None


def nearest(folder: Path) -> Path:
    """The folder, or the nearest of those around it that is there."""
    return next(place for place in (folder, *folder.resolve().parents) if place.is_dir())


@contextmanager
def holding(path: Path) -> Iterator[bool | None]:
    """Hold a file or folder while the block runs: True; False where another holds it, None where none can be held.

    The system lets go of it when a process ends, however that happens.
    """
    if sys.platform == "win32":  # without such locks
        yield None
        return
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe that nobody writes to opens, too
    try:
        yield _hold(descriptor)
    finally:
        os.close(descriptor)


def _hold(descriptor: int) -> bool | None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return None
    return True


def reason(error: Exception) -> str:
    """What is wrong, without the number and the name that the message of an :class:`OSError` repeats."""
    return str(getattr(error, "strerror", None) or error)


def size_text(count: float) -> str:
    """A number of bytes as people read it: "1.5 GiB"."""
    for unit in ("bytes", "KiB", "MiB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:,.1f} GiB"
