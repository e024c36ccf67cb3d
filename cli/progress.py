"""What ``calibrate`` tells while it runs: bars on a terminal, lines with -v, nothing otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table

from ptq_tdq.config import Config
from ptq_tdq.evaluate.trajectories import Comparison
from ptq_tdq.recon import UnitReport

PHASES = {"weights": "Learning to round weights", "activations": "Learning activation intervals"}


class Progress:
    """Progress goes to stderr, the result to stdout."""

    def __init__(self, *, quiet: bool, verbose: bool) -> None:
        self.quiet, self.verbose = quiet, verbose
        self.console = Console(stderr=True, quiet=quiet)
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self.console,
            disable=quiet or not self.console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}

    def line(self, text: str) -> None:
        """One line for the user."""
        if self.console.is_terminal or self.verbose:
            self.console.print(text, highlight=False)

    def config(self, config: Config) -> None:
        """The resolved choices."""
        self.line(
            f"Preset {config.preset}: " + ", ".join(f"{k} {v}" for k, v in config.to_dict().items() if k != "preset")
        )

    def collecting(self, done: int, total: int) -> None:
        """Calls of the U-Net so far, of how many."""
        self._advance("Running the full-precision sampler", done, total, "")
        if done == total:
            self._bars.stop()

    @contextmanager
    def units(self) -> Iterator[None]:
        """Around the reconstruction."""
        self._bars.start()
        try:
            yield
        finally:
            self._bars.stop()

    def unit(self, report: UnitReport) -> None:
        """A finished unit."""
        note = f"{report.unit}: loss {report.before:.4g} -> {report.after:.4g}"
        self._advance(PHASES[report.phase], report.index + 1, report.total, note)
        if self.verbose:
            self.line(f"{report.phase} {report.index + 1}/{report.total} {note} ({report.seconds:.1f} s)")

    def _advance(self, name: str, done: int, total: int, note: str) -> None:
        if name not in self._tasks:
            self._bars.start()
            self._tasks[name] = self._bars.add_task(name, total=total, note="")
        self._bars.update(self._tasks[name], completed=done, note=note)

    def result(self, output_dir: Path, config: Config, learned: Comparison, static: Comparison, seconds: float) -> None:
        """What was written and gained."""
        if self.quiet:
            return
        out = Console()
        table = Table(title="SQNR against full precision (dB, higher is better)")
        for column in ("", "static intervals", f"{config.method}", "gain"):
            table.add_column(column, justify="left" if not column else "right")
        for t, before, after in zip(learned.t, static.noise_sqnr_db, learned.noise_sqnr_db, strict=True):
            table.add_row(f"predicted noise, t = {t:g}", f"{before:.2f}", f"{after:.2f}", f"{after - before:+.2f}")
        table.add_section()
        rows = (
            ("predicted noise, mean over t", static.mean_noise_sqnr_db, learned.mean_noise_sqnr_db),
            ("final latents", static.latent_sqnr_db, learned.latent_sqnr_db),
        )
        for name, before, after in rows:
            table.add_row(name, f"{before:.2f}", f"{after:.2f}", f"{after - before:+.2f}", style="bold")
        out.print(table)
        out.print(f"Wrote {output_dir} in {seconds / 60:.1f} minutes:", highlight=False)
        for path in sorted(output_dir.iterdir()):
            out.print(f"  {path.name}  {path.stat().st_size:,} bytes", highlight=False)
