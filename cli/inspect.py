"""``ptq-tdq inspect``: what an artifact holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from ptq_tdq.artifacts import read_artifact, summarize
from ptq_tdq.cli.options import json_option, print_json


@click.command("inspect")
@click.argument("artifact", type=click.Path(path_type=Path))
@json_option
def inspect_command(artifact: Path, as_json: bool) -> None:
    """Show model, choices, sizes, and each quantizer of ARTIFACT."""
    summary = summarize(read_artifact(artifact))
    if as_json:
        print_json(summary)
        return
    console = Console()
    base = summary["base_model"]
    console.print(f"[bold]{base['id']}[/bold] (sha256 {base['sha256'][:12]})")
    console.print(
        f"{summary['scheme']}, method {summary['method']}, preset {summary['preset']}; {summary['num_layers']} layers, "
        f"{len(summary['quantizers'])} activation quantizers, t = 0 to {summary['num_train_timesteps'] - 1}"
    )
    console.print(
        f"{summary['bytes'] / 1e6:.2f} MB on disk, {summary['fp32_bytes'] / 1e6:.2f} MB in float32 "
        f"({summary['compression']:.1f}x smaller)"
    )
    console.print(_weights(summary["weights"]))
    console.print(_quantizers(summary["quantizers"]))


def _weights(rows: list[dict[str, Any]]) -> Table:
    table = Table("weight", "kind", "shape", "bits", "scales", "ranges", title="Weights")
    for r in rows:
        shape = "x".join(map(str, r["shape"]))
        table.add_row(r["name"], r["kind"], shape, str(r["bits"]), r["granularity"], str(r["channel_ranges"]))
    return table


def _quantizers(rows: list[dict[str, Any]]) -> Table:
    table = Table(
        "activation", "method", "bits", "zero point", "scale t=0", "T/2", "T-1", "max/min", title="Activations"
    )
    for r in rows:
        low, high = r["zero_point_min"], r["zero_point_max"]
        keys = ("scale_first", "scale_middle", "scale_last", "scale_max_over_min")
        scales = ["at run time" if r[key] is None else f"{r[key]:.4g}" for key in keys]
        table.add_row(r["name"], r["method"], str(r["bits"]), str(low) if low == high else f"{low}..{high}", *scales)
    return table
