"""What a command tells while it runs: bars on a terminal, lines with -v, only notices otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Column, Table
from torch import nn

from ptq_tdq.choices import ungrouped
from ptq_tdq.cli.options import result_console
from ptq_tdq.config import Config, preset
from ptq_tdq.errors import printable
from ptq_tdq.evaluate.trajectories import Comparison
from ptq_tdq.files import size_text
from ptq_tdq.recon import Forecast, UnitReport

NAMED = ("scheme", "method", "seed")  # choices that are always told
PHASES = {"weights": "Rounding weights", "activations": "Learning intervals"}


class Progress:
    """Progress goes to stderr, the result to stdout."""

    def __init__(self, *, quiet: bool, verbose: bool) -> None:
        self.quiet, self.verbose = quiet, verbose
        self.console = Console(stderr=True, quiet=quiet, highlight=False)
        self._bar = self._new_bar()
        self._name: str | None = None  # of what the bar counts
        context = click.get_current_context(silent=True)
        if context is not None:
            context.call_on_close(self.stop)  # a bar hides the terminal's cursor, and a run may be stopped

    def _new_bar(self) -> Bars:
        return Bars(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False, table_column=Column(ratio=1, no_wrap=True)),
            console=self.console,
            expand=True,
            disable=self.quiet or not self.console.is_terminal,
        )

    def notice(self, text: str) -> None:
        """Something that the user should know, wherever stderr goes."""
        self.console.print(printable(text), markup=False, soft_wrap=True)

    def line(self, text: str) -> None:
        """What happens now; for a terminal or -v."""
        if self.console.is_terminal or self.verbose:
            self.notice(text)

    def config(self, config: Config) -> None:
        """The choices that the preset does not make; with -v all of them."""
        usual = ungrouped(preset(config.preset).to_dict())
        said = [
            f"{key} {_text(value)}"
            for key, value in ungrouped(config.to_dict()).items()
            if key in NAMED or (key != "preset" and (self.verbose or value != usual[key]))
        ]
        self.line(f"Preset {config.preset}: {', '.join(said)}")

    def counting(self, name: str, done: int, total: int) -> None:
        """Some work, ``done`` of ``total``."""
        self._advance(name, done, total, "")
        if done == total:
            self.stop()

    @contextmanager
    def calls(self, name: str, total: int, *models: nn.Module) -> Iterator[None]:
        """Around some work that takes about ``total`` calls of ``models``."""
        done = 0
        self._advance(name, done, total, "")

        def count(*_: object) -> None:
            nonlocal done
            done = min(done + 1, total)
            self._advance(name, done, total, "")

        handles = [model.register_forward_hook(count) for model in models]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self.stop()

    def unit(self, report: UnitReport) -> None:
        """A finished unit."""
        note = f"{report.unit}: loss {report.before:.4g} -> {report.after:.4g}"
        self._advance(PHASES[report.phase], report.index + 1, report.total, note)
        if self.verbose:
            self.line(f"{report.phase} {report.index + 1}/{report.total} {note} ({report.seconds:.1f} s)")

    def stop(self) -> None:
        """Leave the bar as it is; what comes later has its own: a notebook redraws but one line."""
        self._bar.stop()
        self._bar, self._name = self._new_bar(), None

    def _advance(self, name: str, done: int, total: int, note: str) -> None:
        name, note = printable(name), printable(note)
        if name != self._name:
            self.stop()
            if not self.console.is_terminal:
                self.line(name)
            self._name = name
            self._bar.start()
            self._bar.add_task(name, total=total, note="")
        self._bar.update(TaskID(0), completed=done, note=note)


def _text(value: object) -> str:
    return "+".join(map(str, value)) or "none" if isinstance(value, list) else str(value)


def show_forecast(found: Forecast) -> None:
    """What a run will take, on stdout."""
    where = "on disk" if found.streams_on_disk else "in memory"
    sampling, seconds, measuring = found.recording_seconds / 60, found.seconds / 60, found.measuring_seconds / 60
    shared = {"processes": f"{found.processes}, which share the calls and the work"} if found.processes > 1 else {}
    lines = shared | {
        "blocks": f"{found.units}, with {found.layers} quantized layers",
        "recorded calls": f"{found.rows:,} rows, {size_text(found.recorded_bytes)}",
        "between blocks": f"{size_text(found.stream_bytes)}, {where}",
        "memory": f"{size_text(found.memory_bytes)} at the peak",
        "disk": f"{size_text(found.disk_bytes)} at the peak",
        "time": f"{sampling:.1f} minutes of sampling, {seconds:.1f} of calibration, {measuring:.1f} of measuring it",
    }
    for name, text in lines.items():
        click.echo(f"{name:15}{text}")


def show_gain(method: str, learned: Comparison, static: Comparison) -> None:
    """The learned intervals beside static ones (the best single interval of each quantizer, not learned), on stdout."""
    table = Table(title="SQNR against full precision (dB, higher is better)")
    for column in ("", "static (MSE)", f"{method} (learned)", "gain"):
        table.add_column(column, justify="right" if column else "left")
    for t, before, after in zip(learned.t, static.noise_sqnr_db, learned.noise_sqnr_db, strict=True):
        table.add_row(f"prediction, t = {t:g}", *_row(before, after))
    table.add_section()
    mean = static.mean_noise_sqnr_db, learned.mean_noise_sqnr_db
    table.add_row("prediction, mean over t", *_row(*mean), style="bold")
    table.add_row("final latents", *_row(static.latent_sqnr_db, learned.latent_sqnr_db), style="bold")
    result_console().print(table)


def _row(before: float, after: float) -> tuple[str, str, str]:
    return f"{before:.2f}", f"{after:.2f}", f"{after - before:+.2f}"


def show_files(output_dir: Path, seconds: float) -> None:
    """What was written."""
    out = result_console()
    out.print(f"Wrote {output_dir} in {seconds / 60:.1f} minutes:", markup=False)
    for path in sorted(output_dir.iterdir()):
        out.print(f"  {path.name}  {path.stat().st_size:,} bytes", markup=False)
