"""``ptq-tdq inspect``: what an artifact holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rich.table import Table

from ptq_tdq.artifacts import read_artifact, summarize
from ptq_tdq.cli.options import FilePath, json_option, print_json, result_console, verbose_option
from ptq_tdq.cli.original import check_class
from ptq_tdq.errors import printable
from ptq_tdq.files import size_text
from ptq_tdq.load import load_quantized


@click.command("inspect")
@click.argument("artifact", type=FilePath())
@click.option("--runtime", is_flag=True, help="Show instead what runs on this machine with the integer backend.")
@json_option
@verbose_option
def inspect_command(artifact: Path, runtime: bool, as_json: bool, verbose: bool) -> None:
    """Show model, choices, sizes, and each quantizer of ARTIFACT."""
    if runtime:
        check_class(read_artifact(artifact))
        facts = load_quantized(artifact, backend="integer").facts
        if as_json:
            print_json(facts)
            return
        for line in _runtime(printable(facts)):
            click.echo(line)
        return
    summary = summarize(read_artifact(artifact))
    if as_json:
        print_json(summary)
        return
    summary, console = printable(summary), result_console()
    for line in _facts(summary):
        console.print(line)
    console.print(_weights(summary["weights"]))
    console.print(_quantizers(summary["quantizers"]))


def _runtime(facts: dict[str, Any]) -> list[str]:
    kinds = ", ".join(f"{count} {kind}" for kind, count in facts["integer_kinds"].items())
    return [
        f"{facts['integer_layers']} layers in integers (u8 x s8, int32 sums), by {facts['products']}; "
        f"this processor has {facts['instructions']}" + (f"; {kinds}" if kinds else ""),
        f"quantization, norms and attention around them: {facts['passes']}; {facts['fused_blocks']} blocks fused, "
        f"{facts['integer_products']} products of attention on codes",
        f"{size_text(facts['weight_bytes'])} of weights in memory",
        f"integer weights, inputs in floating point: {', '.join(facts['weight_only_layers']) or 'no layer'}",
        f"in floating point: {', '.join(facts['float_layers']) or 'no layer'}",
        *facts["notices"],
    ]


def _facts(summary: dict[str, Any]) -> list[str]:
    base, sizes = summary["base_model"], summary["file_bytes"]
    layers = len(summary["weights"])
    products = summary["num_layers"] - layers
    component = f", {base['component']}" if base.get("component") else ""
    lines = [
        f"{base['id']}{component} (SHA-256 {base['sha256'][:12]})",
        f"{summary['scheme']}, method {summary['method']}, preset {summary['preset']}; {layers} layers, "
        f"{products} attention products, {len(summary['quantizers'])} activation quantizers",
        f"Time axis: {summary['time_axis']['text']}",
        f"{size_text(summary['bytes'])}: weights {size_text(sizes['weights.safetensors'])} "
        f"({size_text(summary['fp32_bytes'])} in float32), "
        f"interval tables {size_text(sizes['interval_tables.safetensors'])}",
    ]
    if summary["coverage"] is not None:
        lines.append(
            f"{100 * summary['coverage']:.4g}% of the multiply-accumulates with weights are in quantized layers"
        )
    if summary["mean_bits"] is not None:
        bits = summary["mean_bits"]
        lines.append(f"On average {bits['weights']:.3g} bits a weight, {bits['activations']:.3g} bits an operand")
    lines += [summary["choice"]] if summary["choice"] else []
    lines += summary["notices"]
    metrics = summary["metrics"]
    measured = {key: metrics.get(key, {}).get("latent_sqnr_db") for key in ("learned", "static")}
    parts = [f"{value:.2f} dB {key}" for key, value in measured.items() if value is not None]
    if parts:
        lines.append(f"SQNR of the final latents: {', '.join(parts)}")
    return lines


def _weights(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="Weights")
    table.add_column("weight", overflow="fold")
    for column in ("kind", "shape", "bits", "scales", "ranges"):
        table.add_column(column)
    for r in rows:
        shape = "x".join(map(str, r["shape"]))
        table.add_row(r["name"], r["kind"], shape, str(r["bits"]), r["granularity"], str(r["channel_ranges"]))
    return table


def _quantizers(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="Activations")
    table.add_column("activation", overflow="fold")
    for column in ("method", "bits", "zero point", "scale t=0", "T/2", "T", "max/min"):
        table.add_column(column)
    for r in rows:
        low, high = r["zero_point_min"], r["zero_point_max"]
        keys = ("scale_first", "scale_middle", "scale_last", "scale_max_over_min")
        scales = ["at run time" if r[key] is None else f"{r[key]:.4g}" for key in keys]
        table.add_row(r["name"], r["method"], str(r["bits"]), str(low) if low == high else f"{low}..{high}", *scales)
    return table
