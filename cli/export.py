"""``ptq-tdq export``: interval tables and ONNX graphs for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ptq_tdq.artifacts import Artifact, check_base_model, read_artifact
from ptq_tdq.atomic import FileKind, check_file_target, check_target
from ptq_tdq.calib_data import collect
from ptq_tdq.calls import Calls
from ptq_tdq.cli.options import (
    FilePath,
    json_option,
    original_options,
    print_json,
    quiet_option,
    refuse_inside,
    refuse_others,
    verbose_option,
)
from ptq_tdq.cli.original import check_class, load_original
from ptq_tdq.errors import UsageError
from ptq_tdq.export import export_tables

TABLES, GRAPHS, COMPONENT = ("csv", "json", "npz"), ("onnx", "onnx-float"), "diffusers"
RUNTIMES = ("portable", "onnxruntime", "openvino", "qdq")
TABLE = FileKind("an interval table", rb'layer,t,scale,|\{\n"layer": \[|PK\x03\x04.{26}layer\.npy')
SAMPLES = 8  # whose outputs have a range in each step
GRAPH = FileKind("a graph of ptq-tdq", rb"\x08.\x12\x07ptq-tdq")
# of the command itself; all others are of a model
OWN = ("artifact", "kind", "runtime", "steps", "int8_outputs", "output", "as_json", "verbose", "quiet")


@click.command("export")
@click.argument("artifact", type=FilePath())
@click.option(
    "--format",
    "kind",
    type=click.Choice([*TABLES, *GRAPHS, COMPONENT]),
    default="csv",
    show_default=True,
    help="Tables (csv, json, npz), a graph (onnx, onnx-float), or a component of a pipeline (diffusers).",
)
@click.option(
    "--runtime",
    type=click.Choice(RUNTIMES),
    help="With --format onnx: what the graph will run on. Only onnxruntime and openvino get integer kernels out of "
    "theirs; portable runs everywhere; qdq is a folder of static graphs, one for each time step, as hardware "
    "toolchains take them.  [default: portable]",
)
@click.option(
    "--steps",
    type=click.IntRange(1, 1 << 16),
    help="With --runtime qdq: steps of a sampling run, whose time steps get graphs.  [default: as calibrated]",
)
@click.option(
    "--int8-outputs",
    is_flag=True,
    help="With --runtime qdq: what convolutions give in 8 bits too, as onnxruntime and many accelerators need it for "
    "integer kernels; some dB are lost. The calls should hold some samples.",
)
@click.option(
    "--output",
    type=FilePath(),
    required=True,
    help="The file to write, or an earlier export to replace; the folder of diffusers and of qdq.",
)
@click.option(
    "--calls",
    "calls_file",
    type=FilePath(),
    help="For a graph: recorded calls of the model (Calls.save), of which one is enough, but for --runtime qdq, which "
    "takes the time steps of all.  [default: they are recorded while the full-precision model samples]",
)
@original_options
@json_option
@verbose_option
@quiet_option
def export_command(
    artifact: Path,
    kind: str,
    runtime: str | None,
    steps: int | None,
    int8_outputs: bool,
    output: Path,
    calls_file: Path | None,
    source: str | None,
    as_json: bool,
    verbose: bool,
    quiet: bool,
    **given: Any,
) -> None:
    """Write ARTIFACT for other programs.

    csv, json and npz hold the interval tables: layer, t, scale, zero_point, qmin, qmax, lo, hi. onnx is the whole
    quantized model as one graph, with the tables inside and the arguments of the model's calls, the time step among
    them, as inputs; or, with --runtime qdq, a folder of graphs in which intervals are constants. onnx-float is for
    hardware teams: the graph in floating point whose nodes have the names of the table, and the table as CSV beside it.
    diffusers is a folder that takes the denoiser's place in a saved pipeline, for programs that import
    ptq_tdq.integrations.diffusers.

    Sizes that a graph fixes (of a latent, of a prompt) are those of the recorded call, so of --height, --width and the
    like.
    """
    _check_together(kind, runtime, steps, int8_outputs, calls_file)
    refuse_inside(output, [artifact])
    _check_output(output, kind, runtime)
    stored, written = read_artifact(artifact), [output]
    if kind in TABLES:
        export_tables(stored, output, kind)
    elif kind == COMPONENT:
        from ptq_tdq.integrations.diffusers import export_component  # seconds of import

        check_class(stored)
        export_component(stored, output)
    else:
        from ptq_tdq.export import onnx  # an extra

        check_class(stored)
        calls = None if calls_file is None else Calls.load(calls_file)
        if not quiet:
            click.echo("Exporting the graph; this takes from seconds to minutes.", err=True)
        if calls is None:
            count = (steps or _steps_of(stored)) if runtime == "qdq" else 1
            calls = _record(stored, source, count, SAMPLES if int8_outputs else 1, given)
        if runtime == "qdq":
            onnx.export_onnx_steps(stored, output, calls, int8_outputs=int8_outputs)
        elif kind == "onnx":
            onnx.export_onnx(stored, output, runtime or "portable", calls)
        else:
            written.append(onnx.export_onnx_float(stored, output, calls))
    if as_json:
        print_json({"written": [str(path) for path in written]})
    elif not quiet:
        click.echo(f"Wrote {' and '.join(map(str, written))}", err=True)


def _check_together(
    kind: str, runtime: str | None, steps: int | None, int8_outputs: bool, calls_file: Path | None
) -> None:
    """Raise :class:`UsageError` for options that do not go together."""
    if kind in (*TABLES, COMPONENT):
        refuse_others(OWN, f"--format {kind} calls no model")
    if runtime is not None and kind != "onnx":
        raise UsageError(f"--runtime goes with --format onnx. Got --format {kind} instead.")
    if steps is not None and (runtime != "qdq" or calls_file is not None):
        raise UsageError("--steps goes with --runtime qdq and without --calls, which bring their own time steps.")
    if int8_outputs and runtime != "qdq":
        raise UsageError("--int8-outputs goes with --runtime qdq; the other graphs have outputs in floating point.")


def _check_output(output: Path, kind: str, runtime: str | None) -> None:
    """Raise :class:`UsageError` or :class:`OutputError` for a place that what is asked for cannot be written to."""
    if runtime == "qdq" or kind == COMPONENT:
        check_target(output)
        return
    if output.is_dir():
        raise UsageError(f"The output '{output}' is a folder; name a file in it.")
    check_file_target(output, TABLE if kind in TABLES else GRAPH)
    if kind == "onnx-float":
        check_file_target(output.with_suffix(".csv"), TABLE)


def _steps_of(stored: Artifact) -> int:
    """Steps of the sampling run that the calibration set comes from."""
    found: int | None = stored.config["calibration_set"].get("num_inference_steps")
    if found is None:
        raise UsageError(
            "The artifact was calibrated on recorded calls, so the steps of a sampling run are not known; "
            "give --steps, or the calls themselves (--calls)."
        )
    return found


def _record(stored: Artifact, source: str | None, steps: int, samples: int, given: dict[str, Any]) -> Calls:
    """Calls of the full-precision model for some samples, as its own sampling makes them."""
    model = load_original(source, stored, **given)
    check_base_model(stored, model.sha256)
    return collect(model, samples_per_step=samples, calibration_steps=steps, num_inference_steps=max(2, steps))
