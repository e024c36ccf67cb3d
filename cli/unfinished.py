"""The folder of an unfinished run, beside the artifact that it will become."""

from __future__ import annotations

import shutil
from pathlib import Path

from ptq_tdq.errors import OutputError

# What a run puts there, and what a write that was killed leaves behind.
_OWN = ("run.json", "weights-*.safetensors", "activations-*.safetensors", "finetune-*.safetensors", ".ptq-tdq-*.tmp")


def unfinished_folder(output_dir: Path) -> Path:
    """``<output_dir>.partial``; raises :class:`OutputError` where that holds anything but an unfinished run."""
    target = output_dir.resolve()
    folder = target.with_name(target.name + ".partial")
    if folder.is_dir():
        foreign = sorted({path.name for path in folder.iterdir()} - {path.name for path in _own(folder)})
        if foreign:
            raise OutputError(
                f"The folder '{folder}', where the unfinished run would be kept, holds '{foreign[0]}', which is no "
                "part of one; move it away or choose another output directory."
            )
    return folder


def clear(folder: Path) -> None:
    """Remove what an unfinished run has kept, and nothing else."""
    for path in _own(folder):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def discard(folder: Path) -> None:
    """Remove an unfinished run with its folder."""
    clear(folder)
    if folder.is_dir():
        folder.rmdir()


def _own(folder: Path) -> list[Path]:
    """Its files, and the hidden folders of its writers; a pipe or a device, which may never end, is neither."""
    return [
        path
        for pattern in _OWN
        for path in folder.glob(pattern)
        if (path.is_dir() if pattern == _OWN[-1] else path.is_file())
    ]
