"""Exported ONNX files on the runtimes that they are for, beside the same model in float32, interleaved in one process.

One JSON line per (model, scheme, batch), one thread: milliseconds of one run of each file (process CPU time, the least
of the rounds), and of one call of OnnxDenoiser; each file's speed over its runtime's float32 and over that runtime's
own static int8 model (made by onnxruntime.quantization, and by NNCF), how many products the runtime executes as
integers, the file's size over that of the float32 weights, and the SQNR of its output against the simulated model's and
against full precision, on calls of other trajectories than calibration's; that of the runtimes' own int8 models, too,
whose intervals come from these very inputs. "qdq" is the graph of one step of ``--runtime qdq``, "qdq-int8" the same
with ``--int8-outputs``. OpenVINO computes what is not integers in float32, in all of its models. Calibration is a quick
one: speed does not depend on it, and ``--calibrated`` gives the files all that preset default has.

"float32" is the graph of ``--format onnx-float``; for onnxruntime with the same normalization nodes as in the integer
file, so that only integers make the difference.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import click
import onnx
import onnxruntime
import openvino
import torch
from bench_runtime import Call, onnxruntime_calls, openvino_calls
from lines import append, parse_choices, read
from subjects import call_of, make_model
from torch import nn

from ptq_tdq import calibrate, collect, preset
from ptq_tdq.artifacts import Artifact
from ptq_tdq.calls import Calls, prediction
from ptq_tdq.evaluate.metrics import sqnr_db
from ptq_tdq.export.onnx import FORMS, OnnxDenoiser
from ptq_tdq.export.onnx.file import encode_onnx, write_steps
from ptq_tdq.export.onnx.floating import Floating
from ptq_tdq.export.onnx.onnxruntime_form import OnnxRuntime
from ptq_tdq.export.onnx.outputs import outputs_of
from ptq_tdq.export.onnx.portable import Portable
from ptq_tdq.export.onnx.runtimes import RUNTIMES
from ptq_tdq.export.onnx.skeleton import make_skeleton
from ptq_tdq.load import build_quantized

RESULTS = Path(__file__).parent / "results" / "onnx.jsonl"
# Rounding and intervals do not matter for speed: nearest rounding, the observed steps' best intervals.
QUICK = {"rounding": "nearest", "activation_iterations": 0, "method": "step-table"}
SAMPLES: dict[str, Any] = {"samples_per_step": 4, "calibration_steps": 5, "num_inference_steps": 5}
T = 500


class FloatForOnnxRuntime(Floating):
    """Float32 with the normalization nodes of the integer file."""

    group_norm = OnnxRuntime.group_norm


FILES: dict[str, type[Portable]] = {
    "float32": Floating,
    "float32-ort": FloatForOnnxRuntime,
    **FORMS,
}
CALLS = {  # name -> file, runtime, the call that it is compared with
    "onnxruntime float32": ("float32-ort", "onnxruntime", "onnxruntime float32"),
    "onnxruntime": ("onnxruntime", "onnxruntime", "onnxruntime float32"),
    "portable on onnxruntime": ("portable", "onnxruntime", "onnxruntime float32"),
    "openvino float32": ("float32", "openvino", "openvino float32"),
    "openvino": ("openvino", "openvino", "openvino float32"),
    "portable on openvino": ("portable", "openvino", "openvino float32"),
    "qdq on onnxruntime": ("qdq", "onnxruntime", "onnxruntime float32"),
    "qdq on openvino": ("qdq", "openvino", "openvino float32"),
    "qdq-int8 on onnxruntime": ("qdq-int8", "onnxruntime", "onnxruntime float32"),
    "qdq-int8 on openvino": ("qdq-int8", "openvino", "openvino float32"),
}
STATIC = {"onnxruntime": "onnxruntime static int8", "openvino": "OpenVINO + NNCF int8"}  # a runtime's own
NOISE = [f"{name}, dB" for name in STATIC]


@click.command()
@click.option("--models", default="embedded,random,reference-dit")
@click.option("--schemes", default="W8A8,W4A8")
@click.option("--batches", default="1,8")
@click.option("--rounds", default=15)
@click.option("--calibrated", is_flag=True, help="Calibrate as preset default does, which takes minutes.")
@click.option("--set", "settings", multiple=True, help="A choice of calibration, name=value.")
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS)
@click.option("--render", is_flag=True, help="Only print the table.")
def main(
    models: str,
    schemes: str,
    batches: str,
    rounds: int,
    calibrated: bool,
    settings: tuple[str, ...],
    results: Path,
    render: bool,
) -> None:
    chosen = parse_choices(settings)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    for name in [] if render else models.split(","):
        with tempfile.TemporaryDirectory() as folder:
            model = make_model(name, Path(folder))
            for scheme in schemes.split(","):
                config = preset("default", scheme=scheme, **({} if calibrated else QUICK | SAMPLES), **chosen)
                calls, fresh = (collect(model, **config.recipe | {"seed": seed}) for seed in (0, 1))
                artifact = calibrate(model, config, calls).to_artifact()
                paths = export(artifact, calls, Path(folder) / scheme)
                for batch in map(int, batches.split(",")):
                    line = {"model": name, "scheme": scheme, "batch": batch, "calibrated": calibrated, "set": chosen}
                    line |= measure(model.denoiser, artifact, fresh, paths, batch, rounds)
                    append(results, line)
    print(table(read(results)))


def export(artifact: Artifact, calls: Calls, folder: Path) -> dict[str, Path]:
    folder.mkdir()
    skeleton, paths = make_skeleton(artifact, calls), {}
    for name, form in FILES.items():
        paths[name] = folder / f"{name}.onnx"
        runtime = name if name in FORMS else "float"
        paths[name].write_bytes(encode_onnx(artifact, form, skeleton, runtime))
    near = (calls.t - T).abs()
    outputs = [outputs_of(build_quantized(artifact), calls.select((near == near.min()).nonzero().flatten()))]
    for name, own in (("qdq", None), ("qdq-int8", outputs)):
        paths[name] = folder / name
        paths[name].mkdir()
        write_steps(artifact, paths[name], skeleton, [[float(T)]], own)
    return paths


def measure(
    model: nn.Module, artifact: Artifact, calls: Calls, paths: dict[str, Path], batch: int, rounds: int
) -> dict[str, Any]:
    inputs = call_of(calls, batch, T)
    with torch.no_grad():
        full, simulated = (prediction(denoiser(**inputs)) for denoiser in (model, build_quantized(artifact)))
    denoisers = {
        name: OnnxDenoiser(paths[file], runtime=runtime, threads=1) for name, (file, runtime, _) in CALLS.items()
    }
    outputs = {name: prediction(denoiser(**inputs)) for name, denoiser in denoisers.items()}
    run: dict[str, Call] = {name: bare(paths[file], runtime, inputs) for name, (file, runtime, _) in CALLS.items()}
    run |= {f"OnnxDenoiser, {name}": partial(denoisers[name], **inputs) for name in STATIC}
    with torch.no_grad():
        beside = openvino_calls(model, inputs, 1, "f32") | onnxruntime_calls(model, inputs, 1, paths["qdq"].parent)
    run |= beside
    every = outputs | {name: torch.from_numpy(call()[0]) for name, call in beside.items()}
    best = dict.fromkeys(run, float("inf"))
    for _ in range(rounds):
        for name, call in run.items():
            began = time.process_time()
            call()
            best[name] = min(best[name], time.process_time() - began)
    size = 4 * sum(v.numel() for part in (artifact.weight_codes, artifact.float_state) for v in part.values())
    return {
        "milliseconds": {name: 1000 * seconds for name, seconds in best.items()},
        "over_float32": {name: best[beside] / best[name] for name, (*_, beside) in CALLS.items()},
        "over_own_static": {name: best[STATIC[runtime]] / best[name] for name, (_, runtime, _) in CALLS.items()},
        "products": {
            "quantized": sum(2 if r.kind == "product" else len(r.inputs) for r in artifact.layers),
            "onnxruntime": onnxruntime_products(paths["onnxruntime"]),
            "openvino": openvino_products(paths["openvino"], inputs),
        },
        "file_over_float32": {name: paths[name].stat().st_size / size for name in FORMS},
        "sqnr_db_to_simulated": {name: sqnr_db(simulated, output) for name, output in outputs.items()},
        "sqnr_db_to_full": {name: sqnr_db(full, output) for name, output in every.items()},
    }


def bare(path: Path, runtime: str, inputs: dict[str, Any]) -> Call:
    """A run of a file, or of the graph of a folder, with the tensors of a call as they are."""
    file = next(path.glob("*.onnx")) if path.is_dir() else path
    kinds = {
        value.name: value.type.tensor_type.elem_type for value in onnx.load(file, load_external_data=False).graph.input
    }
    dtypes = {name: onnx.helper.tensor_dtype_to_np_dtype(kind) for name, kind in kinds.items()}
    return partial(
        RUNTIMES[runtime](file, 1, True), {name: inputs[name].numpy().astype(dtypes[name]) for name in dtypes}
    )


def onnxruntime_products(path: Path) -> dict[str, int]:
    """Products in the graph that onnxruntime executes, by operator."""
    with tempfile.NamedTemporaryFile(suffix=".onnx") as file:
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = file.name
        options.log_severity_level = 3
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        kinds = Counter(node.op_type for node in onnx.load(file.name).graph.node)
    return {kind: count for kind, count in sorted(kinds.items()) if "Conv" in kind or "MatMul" in kind}


def openvino_products(path: Path, inputs: dict[str, Any]) -> dict[str, int]:
    """Products that OpenVINO executes, by its own name of the kernel."""
    core = openvino.Core()
    model = core.read_model(str(path))
    names = {value.any_name for value in model.inputs}
    model.reshape({name: list(value.shape) for name, value in inputs.items() if name in names})
    nodes = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}).get_runtime_model().get_ops()
    info = [{key: getattr(value, "value", value) for key, value in node.get_rt_info().items()} for node in nodes]
    products = (i for i in info if i.get("layerType") in ("Convolution", "FullyConnected", "MatMul"))
    return dict(sorted(Counter(f"{i['layerType']} {i['primitiveType']}" for i in products).items()))


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown: speed over the runtime's float32, and behind it over its own static int8; last SQNR against full
    precision, of our file and behind it of that static model.
    """
    names = [n for n in CALLS if not n.endswith("float32") and all(n in line["over_float32"] for line in lines)]
    rows = ["| model | scheme | batch | " + " | ".join([*names, "file", *NOISE]) + " |"]
    rows.append("|---" * (4 + len(names) + len(NOISE)) + "|")
    for line in lines:
        speeds = " | ".join(f"{line['over_float32'][n]:.2f} / {line['over_own_static'][n]:.2f}" for n in names)
        size = line["file_over_float32"]["onnxruntime"]
        model = " ".join([line["model"], *(f"{name}={value}" for name, value in line.get("set", {}).items())])
        known = line.get("sqnr_db_to_full", {})
        noise = " | ".join(f"{known[n]:.0f} / {known[STATIC[n]]:.0f}" if known else "" for n in STATIC)
        rows.append(f"| {model} | {line['scheme']} | {line['batch']} | {speeds} | {size:.3f} | {noise} |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
