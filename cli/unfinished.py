"""A run that ends with an artifact: its folder, beside the artifact, is kept until then."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import click

from ptq_tdq import processes
from ptq_tdq.artifacts import check_output
from ptq_tdq.atomic import alone
from ptq_tdq.cli.options import print_json
from ptq_tdq.cli.progress import show_files
from ptq_tdq.errors import OutputError
from ptq_tdq.files import reason
from ptq_tdq.quantized_model import QuantizedModel

# What a run puts there, and what a write that was killed leaves behind.
_OWN = ("run.json", "weights-*.safetensors", "activations-*.safetensors", "finetune-*.safetensors", ".ptq-tdq-*.tmp")


class Unfinished:
    """A run on its way to ``output_dir``. ``stopped`` says where the same command goes on.

    Raises :class:`OutputError` where the artifact cannot be written, or its folder holds something else.
    """

    def __init__(self, context: click.Context, output_dir: Path, *, overwrite: bool, stopped: str) -> None:
        self.began = time.perf_counter()
        self.context, self.output_dir, self.overwrite = context, output_dir, overwrite
        check_output(output_dir, overwrite=overwrite)
        self.folder = unfinished_folder(output_dir)
        context.ensure_object(dict)["on_stop"] = f"Stopped; the same command goes on {stopped}."

    def hold(self, *, resume: bool) -> None:
        """Keep other runs out of the folder until the command ends; without ``resume`` it is emptied."""
        if processes.rank() == 0:
            self.context.with_resource(alone(self.folder))
            if not resume:
                clear(self.folder)

    def finish(self, quantized: QuantizedModel, *, as_json: bool, quiet: bool, show: Callable[[], None] | None) -> None:
        """Write the artifact and tell of it; ``show`` draws what was measured, if anything was."""
        quantized.save_pretrained(self.output_dir, overwrite=self.overwrite)
        with suppress(OSError):  # the folder goes with the command, unless somebody else has put something there
            clear(self.folder)
        if as_json:
            print_json({"output_dir": str(self.output_dir), **quantized.metrics})
        elif not quiet:
            if show:
                show()
            show_files(self.output_dir, time.perf_counter() - self.began)


def unfinished_folder(output_dir: Path) -> Path:
    """``<output_dir>.partial``; raises :class:`OutputError` where that holds anything but an unfinished run.

    Hidden files do not count: file managers leave some wherever they look.
    """
    target = output_dir.resolve()
    folder = target.with_name(target.name + ".partial")
    try:
        there = folder.is_dir()
    except OSError as error:  # a name that is too long with its ending
        raise OutputError(
            f"The folder '{folder}', where the unfinished run would be kept, cannot be made ({reason(error)}); "
            "choose another output directory."
        ) from None
    if there:
        shown = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
        foreign = sorted(shown - {path.name for path in _own(folder)})
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


def _own(folder: Path) -> list[Path]:
    """Its files, and the hidden folders of its writers; a pipe or a device, which may never end, is neither."""
    return [
        path
        for pattern in _OWN
        for path in folder.glob(pattern)
        if (path.is_dir() if pattern == _OWN[-1] else path.is_file())
    ]
