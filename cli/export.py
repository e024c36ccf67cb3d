"""``ptq-tdq export``: interval tables and ONNX graphs for other programs."""

from __future__ import annotations

from pathlib import Path

import click

from ptq_tdq.artifacts import read_artifact
from ptq_tdq.cli.options import quiet_option, verbose_option
from ptq_tdq.errors import UsageError
from ptq_tdq.export import export_tables

TABLES, GRAPHS = ("csv", "json", "npz"), ("onnx", "onnx-float")
RUNTIMES = ("portable", "onnxruntime", "openvino")


@click.command("export")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "kind",
    type=click.Choice([*TABLES, *GRAPHS]),
    default="csv",
    show_default=True,
    help="Tables (csv, json, npz), or a graph (onnx, onnx-float).",
)
@click.option(
    "--runtime",
    type=click.Choice(RUNTIMES),
    help="With --format onnx: what the graph will run on. Only onnxruntime and openvino get integer kernels out of "
    "theirs; portable runs everywhere.  [default: portable]",
)
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), required=True, help="The file to write.")
@verbose_option
@quiet_option
def export_command(artifact: Path, kind: str, runtime: str | None, output: Path, verbose: bool, quiet: bool) -> None:
    """Write ARTIFACT for other programs.

    csv, json and npz hold the interval tables: layer, t, scale, zero_point, qmin, qmax, lo, hi. onnx is the whole
    quantized model as one graph, with the tables inside and the time step as an input. onnx-float is for hardware
    teams: the graph in floating point whose nodes have the names of the table, and the table as CSV beside it.
    """
    if runtime is not None and kind != "onnx":
        raise UsageError(f"--runtime goes with --format onnx. Got --format {kind} instead.")
    stored, written = read_artifact(artifact), [output]
    if kind in TABLES:
        export_tables(stored, output, kind)
    else:
        from ptq_tdq.export import onnx  # an extra

        if not quiet:
            click.echo("Exporting the graph; this takes up to a minute.", err=True)
        if kind == "onnx":
            onnx.export_onnx(stored, output, runtime or "portable")
        else:
            written.append(onnx.export_onnx_float(stored, output))
    if not quiet:
        click.echo(f"Wrote {' and '.join(map(str, written))}", err=True)
