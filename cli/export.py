"""``ptq-tdq export``: interval tables for other programs."""

from __future__ import annotations

from pathlib import Path

import click

from ptq_tdq.artifacts import read_artifact
from ptq_tdq.cli.options import quiet_option, verbose_option
from ptq_tdq.export import export_tables


@click.command("export")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--format", "kind", type=click.Choice(["csv", "json", "npz"]), default="csv", show_default=True)
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), required=True, help="The file to write.")
@verbose_option
@quiet_option
def export_command(artifact: Path, kind: str, output: Path, verbose: bool, quiet: bool) -> None:
    """Write the interval tables of ARTIFACT.

    The columns are layer, t, scale, zero_point, qmin, qmax, lo, hi.
    """
    export_tables(read_artifact(artifact), output, kind)
    if not quiet:
        click.echo(f"Wrote {output}", err=True)
