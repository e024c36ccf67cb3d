"""From a survey to a folder: ``report.html`` and ``figures/``."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from ptq_tdq.atomic import Contents, check_target, publish_directory
from ptq_tdq.evaluate.images import grid_png
from ptq_tdq.report.data import report_data
from ptq_tdq.report.figures import draw_figures
from ptq_tdq.report.page import render_page
from ptq_tdq.report.survey import Survey, sheet, thumbnails

PAGE, FIGURES = "report.html", "figures"
_CONTENTS = Contents("a report", (PAGE, FIGURES))


def check_output(folder: Path, overwrite: bool) -> None:
    """Raise :class:`OutputError` for a folder that :func:`write_report` would refuse."""
    check_target(folder, _CONTENTS if overwrite else None)


def write_report(found: Survey, folder: Path, *, overwrite: bool = False) -> list[str]:
    """Write the page and its figures, all or nothing; returns the file names.

    Raises :class:`OutputError` for a folder that cannot be written, that is not empty (without ``overwrite``), or that
    holds anything but a report.
    """
    check_output(folder, overwrite)  # before what takes long
    data = report_data(found)
    samples = samples_of(found)
    conditions = found.reference.conditions if found.reference else []
    pictures = {name: sheet(images, conditions) for name, images in samples.items()}
    files = {PAGE: render_page(data, pictures).encode("utf-8")}
    files |= {f"{FIGURES}/{name}": content for name, content in draw_figures(data)}
    if samples:
        files[f"{FIGURES}/samples.png"] = grid_png(samples, conditions)
    with publish_directory(folder, _CONTENTS if overwrite else None) as target:
        (target / FIGURES).mkdir()
        for name, content in files.items():
            (target / name).write_bytes(content)
    return list(files)


def samples_of(found: Survey) -> dict[str, Tensor]:
    """Small pictures by the name of the model that made them, full precision first."""
    if found.reference is None or found.reference.images is None:
        return {}
    images = {"full precision": found.reference.images}
    images |= {s.name: s.measured.images for s in found.subjects if s.measured and s.measured.images is not None}
    return {name: thumbnails(of) for name, of in images.items()}
