"""Files and directories that appear complete or not at all."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from hashlib import sha256
from pathlib import Path

from ptq_tdq.errors import OutputError
from ptq_tdq.files import holding, nearest, size_text

_ADVICE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "free some space or choose another folder"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "choose a folder that you may write to"),
    **dict.fromkeys((errno.ENOTDIR, errno.EEXIST), "a part of its path is a file, choose another path"),
    errno.ENOTEMPTY: "choose another folder, empty it, or ask to overwrite it",
}
_BEGIN = 128  # bytes that tell what a file is
_NEW, _OLD = "new", "old"  # in the hidden folder of a writer


@dataclass(frozen=True)
class Contents:
    """What a directory holds that may be overwritten: ``kind`` for a message ("a report"), ``names`` of its entries."""

    kind: str
    names: tuple[str, ...]  # patterns


@dataclass(frozen=True)
class FileKind:
    """What a file holds that may be replaced: ``kind`` for a message ("a PNG image"), ``begins`` as all of it do."""

    kind: str
    begins: bytes  # a pattern of the first bytes


def write_file(path: Path, data: bytes) -> None:
    """Write the new file ``path`` through to the disk, mode 0644 less the umask; raises OSError."""
    with open(path, "xb", opener=lambda name, flags: os.open(name, flags, 0o644)) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_atomic(path: str | Path, data: bytes) -> None:
    """Write ``data`` to ``path`` (mode 0644 less the umask), replacing a file there; makes missing parent folders.

    Raises :class:`OutputError` when that is impossible; the old file, if any, is then untouched.
    """
    target = Path(path).resolve()  # a link stays a link: the file that it names is replaced
    with _output_errors(target):
        if target.exists() and not target.is_file():  # /dev/stdout and the like must not become regular files
            raise OutputError(f"The output '{target}' is not a regular file; choose another path.")
        target.parent.mkdir(parents=True, exist_ok=True)
        with _workshop(target) as folder:
            write_file(folder / _NEW, data)
            os.replace(folder / _NEW, target)
        _sync_directory(target.parent)


@contextmanager
def publish_directory(path: str | Path, replacing: Contents | None = None) -> Iterator[Path]:
    """Give an empty temporary directory beside ``path``; it becomes ``path`` when the body ends without an error.

    An existing directory must be empty, or hold what is ``replacing`` and nothing else; it is removed only after the
    new one has taken its place. Raises :class:`OutputError` for a target that cannot be written and for every OSError
    of the body.
    """
    target = Path(path).resolve()
    with _output_errors(target):
        check_target(target, replacing)
        target.parent.mkdir(parents=True, exist_ok=True)
        with _workshop(target) as folder:
            (folder / _NEW).mkdir()
            yield folder / _NEW
            _sync_tree(folder)
            _move_into_place(folder, target, replacing is not None)
        _sync_directory(target.parent)


@contextmanager
def _output_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        advice = _ADVICE.get(error.errno or 0, "choose another path")
        raise OutputError(f"The output '{path}' cannot be written ({error.strerror or error}): {advice}.") from error


def check_folder(path: str | Path) -> None:
    """Make a folder for files to come; raises :class:`OutputError` where that or a file in it is impossible."""
    folder = Path(path).resolve()
    with _output_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with _workshop(folder / "probe") as probe:
            write_file(probe / _NEW, b"")


def check_space(needed: int, folder: Path) -> None:
    """Raise :class:`OutputError` for a run with no place for ``needed`` bytes, less those that its ``folder`` holds."""
    place = nearest(folder)
    free = shutil.disk_usage(place).free
    if needed > free + sum(path.stat().st_size for path in folder.glob("*") if path.is_file()):
        raise OutputError(
            f"The run needs about {size_text(needed)} of disk, of which {size_text(free)} are free in {place}; free "
            "some space or choose another output directory."
        )


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Make a folder and keep other processes from it while the block runs; it goes again if nothing is in it.

    Raises :class:`OutputError` where another process has it.
    """
    check_folder(path)
    with holding(path) as held:
        if held is False or not path.exists():  # another process has it, or has just finished
            raise OutputError(f"Another run works in '{path}'; wait for its end or choose another output.")
        try:
            yield
        finally:
            with suppress(OSError):
                path.rmdir()


def check_file_target(path: str | Path, replacing: FileKind, inputs: Iterable[Path] = ()) -> None:
    """Raise :class:`OutputError` for a file that cannot be written, or is one of the ``inputs``, before any work.

    A file that is there must be empty or what is ``replacing``.
    """
    target = Path(path).resolve()
    _check_parents(target)
    there = target.exists()
    if there and not target.is_file():
        raise OutputError(f"The output '{target}' is not a regular file; choose another path.")
    if any(target == other.resolve() or (there and other.exists() and target.samefile(other)) for other in inputs):
        raise OutputError(f"The output '{path}' would replace what is read from there; choose another path.")
    begin = b""
    if there:
        with _output_errors(target), target.open("rb") as file:
            begin = file.read(_BEGIN)
    if begin and not re.match(replacing.begins, begin, re.DOTALL):
        raise OutputError(
            f"The output '{path}' is there and is not {replacing.kind}, so it is not replaced; move it away or choose "
            "another path."
        )


def check_target(path: str | Path, replacing: Contents | None = None) -> None:
    """Raise :class:`OutputError` for a directory that :func:`publish_directory` would refuse."""
    target = Path(path).resolve()
    _clear(target)
    if target.exists() and not target.is_dir():
        raise OutputError(f"The output '{target}' is a file, not a folder; choose another path.")
    if os.path.ismount(target):
        raise OutputError(f"The output '{target}' is a mount point and cannot be replaced; choose a folder inside it.")
    _check_parents(target)
    found = sorted(entry.name for entry in target.iterdir()) if target.is_dir() else []
    if replacing is None and found:
        raise OutputError(
            f"The output '{target}' is not empty; choose another folder, empty it, or ask to overwrite it."
        )
    foreign = [name for name in found if replacing and not any(fnmatch(name, known) for known in replacing.names)]
    if replacing and foreign:
        raise OutputError(
            f"The output '{target}' holds '{foreign[0]}', which is no part of {replacing.kind}; "
            "move it away or choose another folder."
        )


def _check_parents(target: Path) -> None:
    with _output_errors(target):
        parent = next(folder for folder in target.parents if folder.exists())
        if not parent.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if not os.access(parent, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def _move_into_place(folder: Path, target: Path, overwrite: bool) -> None:
    new, old = folder / _NEW, folder / _OLD
    if not (overwrite and target.exists()):
        os.rename(new, target)  # the system itself refuses a target that has been filled in the meantime
        return
    os.rename(target, old)  # killed right here, the old folder comes back with the next run
    try:
        os.rename(new, target)
    except BaseException:
        os.rename(old, target)
        raise


@contextmanager
def _workshop(target: Path) -> Iterator[Path]:
    """A hidden folder beside the target, hence on the same file system: renaming from it is atomic."""
    _clear(target)
    folder = target.with_name(f"{_hidden(target)}{secrets.token_hex(8)}.tmp")
    folder.mkdir()
    try:
        with holding(folder):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _hidden(target: Path) -> str:
    """How the names of the hidden folders of a target begin; its own name may be as long as the system takes."""
    return f".ptq-tdq-{sha256(os.fsencode(target.name)).hexdigest()[:16]}-"


def _clear(target: Path) -> None:
    """Remove what killed writers of this user have left; what one of them was about to replace comes back."""
    for folder in target.parent.glob(f"{_hidden(target)}*.tmp"):
        with suppress(OSError), holding(folder) as held:
            if held and _is_ours(folder) and any(folder.iterdir()):  # an empty one may have been made a moment ago
                if not target.exists() and (folder / _OLD).exists():
                    os.rename(folder / _OLD, target)
                shutil.rmtree(folder)


def _is_ours(path: Path) -> bool:
    """Whether there is a folder, and no link to one, of the user who runs this."""
    found = path.lstat()
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()


def _sync_tree(folder: Path) -> None:
    for root, _, names in os.walk(folder):
        for name in names:
            with open(os.path.join(root, name), "rb") as file:
                os.fsync(file.fileno())
        _sync_directory(Path(root))


def _sync_directory(folder: Path) -> None:
    with suppress(OSError):  # some file systems cannot do this; the files themselves are already safe
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
