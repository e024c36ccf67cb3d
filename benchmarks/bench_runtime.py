"""Speed and size of the integer backend beside other runtimes, interleaved in one process.

One JSON line per (model, batch, threads): milliseconds of one call of the denoiser (the least of the rounds; of CPU
time with ``--clock cpu``), each runtime's speed over torch fp32 eager, and the sizes of the weights. ``--pipeline``
adds images per second of 50 steps. Needs ``pip install -e '.[bench]'``.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from lines import append, read
from subjects import at, call_of, conditional_unet, make_model
from torch import Tensor, nn

from ptq_tdq import calibrate, collect, load_quantized, preset
from ptq_tdq.artifacts import read_artifact
from ptq_tdq.calls import prediction
from ptq_tdq.evaluate.trajectories import run
from ptq_tdq.timeaxis import at as present_at

RESULTS = Path(__file__).parent / "results" / "runtime.jsonl"
QUICK: dict[str, Any] = {"samples_per_step": 2, "calibration_steps": 8}
NEAREST = {"method": "static", "rounding": "nearest", "activation_iterations": 0, **QUICK}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
Call = Callable[[], Any]


@click.command()
@click.option("--models", default="embedded,random,reference-dit", help="Also sd15-quarter, which takes long.")
@click.option("--batches", default="1,8,64")
@click.option("--threads", default="1,2")
@click.option("--beside", default="openvino,onnxruntime", help="Other runtimes than torch.")
@click.option("--rounds", default=15)
@click.option("--clock", type=click.Choice(list(CLOCKS)), default="wall", help="cpu where other work shares the cores.")
@click.option("--pipeline", is_flag=True, help="Images per second of the embedded model, DDIM with 50 steps, instead.")
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS)
@click.option("--render", is_flag=True, help="Only print the table.")
def main(
    models: str,
    batches: str,
    threads: str,
    beside: str,
    rounds: int,
    clock: str,
    pipeline: bool,
    results: Path,
    render: bool,
) -> None:
    torch.set_flush_denormal(True)
    if not render:
        with tempfile.TemporaryDirectory() as folder:
            for name in models.split(","):
                subject = Subject(name, Path(folder) / name)
                for count in map(int, threads.split(",")):
                    torch.set_num_threads(count)
                    if pipeline:
                        append(results, end_to_end(subject))
                        continue
                    for batch in map(int, batches.split(",")):
                        append(results, measure(subject, batch, count, rounds, beside, CLOCKS[clock]))
    lines = read(results)
    print(table([line for line in lines if "milliseconds" in line]))
    for line in lines:
        if "images_per_second" in line:
            rates = ", ".join(f"{name} {rate:.1f}" for name, rate in line["images_per_second"].items())
            print(f"DDIM 50, {line['threads']} threads, images per second: {rates}")
            print(f"Lookup in the tables: {line['lookup_microseconds']:.0f} microseconds")


class Subject:
    """A full-precision model and its artifacts, by scheme; rounding and intervals do not matter for speed."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        if name == "sd15-quarter":
            self.denoiser, self.calls = conditional_unet()
        else:
            self.model = make_model(name, folder)
            self.denoiser = self.model.denoiser
            self.calls = collect(self.model, num_inference_steps=8, **QUICK)
        for scheme in ("W8A8", "W4A8"):
            config = preset("default", scheme=scheme, **NEAREST)
            calibrate(self.denoiser, config, self.calls).save_pretrained(folder / scheme)

    def sizes(self) -> dict[str, float]:
        """Weights as multiples of the float32 bytes: the file, and what the integer backend keeps in memory."""
        full = sum(4 * p.numel() for p in self.denoiser.parameters())
        found = {}
        for scheme in ("W8A8", "W4A8"):
            folder = self.folder / scheme
            found[f"{scheme} file"] = (folder / "weights.safetensors").stat().st_size / full
            found[f"{scheme} memory"] = load_quantized(folder, backend="integer").facts["weight_bytes"] / full
        return found


class _Plain(nn.Module):
    """Positional tensors and a tensor as output, which exporters like best; other arguments are as recorded."""

    def __init__(self, denoiser: nn.Module, inputs: dict[str, Any]) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.names = list(tensors_of(inputs))
        self.rest = {name: value for name, value in inputs.items() if name not in self.names}

    def forward(self, *args: Tensor) -> Tensor:
        return prediction(self.denoiser(**dict(zip(self.names, args, strict=True)), **self.rest))


def tensors_of(inputs: dict[str, Any]) -> dict[str, Tensor]:
    """The arguments that are tensors."""
    return {name: value for name, value in inputs.items() if isinstance(value, Tensor)}


def measure(
    subject: Subject, batch: int, threads: int, rounds: int, beside: str, clock: Callable[[], float]
) -> dict[str, Any]:
    inputs = call_of(subject.calls, batch, 500)
    denoiser, time_argument = subject.denoiser, subject.calls.axis.argument

    def with_bf16() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            denoiser(**inputs)

    calls: dict[str, Call] = {"torch fp32": lambda: denoiser(**inputs), "torch bf16": with_bf16}
    ours = load_quantized(subject.folder / "W8A8", backend="integer")
    w4 = load_quantized(subject.folder / "W4A8", backend="integer")
    # another t at each call, as a sampler of 50 steps
    steps = cycle(at(subject.calls, batch, 20 * i) for i in range(50))
    calls |= {
        "ptq-tdq W8A8": lambda: ours(**inputs | {time_argument: next(steps)}),
        "ptq-tdq W4A8": lambda: w4(**inputs | {time_argument: next(steps)}),
    }
    if "openvino" in beside:
        calls |= openvino_calls(denoiser, inputs, threads)
    if "onnxruntime" in beside:
        calls |= onnxruntime_calls(denoiser, inputs, threads, subject.folder)
    best = dict.fromkeys(calls, float("inf"))
    with torch.no_grad():
        for call in calls.values():
            call()
        for _ in range(rounds):
            for name, call in calls.items():
                began = clock()
                call()
                best[name] = min(best[name], clock() - began)
    return {
        "model": subject.name,
        "parameters": sum(p.numel() for p in denoiser.parameters()),
        "batch": batch,
        "threads": threads,
        "milliseconds": {name: 1000 * seconds for name, seconds in best.items()},
        "over_torch_fp32": {name: best["torch fp32"] / seconds for name, seconds in best.items()},
        "weights_over_fp32": subject.sizes(),
        "runtime": ours.facts,
    }


def openvino_calls(
    denoiser: nn.Module, inputs: dict[str, Any], threads: int, precision: str = "bf16"
) -> dict[str, Call]:
    """Calls of the model in ``precision``, and of its integer form with what is not integers in that."""
    import nncf
    import openvino

    values = tuple(tensors_of(inputs).values())
    arrays = [value.numpy() for value in values]
    plain = openvino.convert_model(_Plain(denoiser, inputs).eval(), example_input=values)
    integer = nncf.quantize(plain, nncf.Dataset([arrays] * 4), fast_bias_correction=True)
    core = openvino.Core()

    def call(model: Any) -> Call:
        options = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads}
        compiled = core.compile_model(model, "CPU", options)
        return lambda: compiled(arrays)

    return {f"OpenVINO {precision}": call(plain), "OpenVINO + NNCF int8": call(integer)}


def onnxruntime_calls(denoiser: nn.Module, inputs: dict[str, Any], threads: int, folder: Path) -> dict[str, Call]:
    import onnxruntime
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = [feed] * 4

        def get_next(self) -> dict[str, np.ndarray] | None:
            return self.left.pop() if self.left else None

    tensors = tuple(tensors_of(inputs).values())
    batch, feed = len(tensors[0]), {f"input{index}": value.numpy() for index, value in enumerate(tensors)}
    paths = [folder / f"batch{batch}-{kind}.onnx" for kind in ("float", "prepared", "int8")]
    if not paths[2].exists():
        torch.onnx.export(
            _Plain(denoiser, inputs).eval(), tensors, paths[0], input_names=list(feed), dynamo=True, verbose=False
        )
        quant_pre_process(paths[0], paths[1])
        quantize_static(
            paths[1],
            paths[2],
            Reader(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["Conv", "MatMul", "Gemm"],
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(paths[2], options, providers=["CPUExecutionProvider"])
    return {"onnxruntime static int8": lambda: session.run(None, feed)}


def end_to_end(subject: Subject) -> dict[str, Any]:
    """Sampling and decoding: batch 64, the model's own scheduler with 50 steps, best of 2 rounds."""
    conditions = subject.model.sampler.conditions(64)
    subjects = {
        "torch fp32": subject.denoiser,
        "ptq-tdq W8A8": load_quantized(subject.folder / "W8A8", backend="integer"),
        "ptq-tdq W4A8": load_quantized(subject.folder / "W4A8", backend="integer"),
    }
    rates = dict.fromkeys(subjects, 0.0)
    for _ in range(2):
        for name, denoiser in subjects.items():
            began = time.perf_counter()
            run(denoiser, subject.model, conditions, 50, 0)
            rates[name] = max(rates[name], len(conditions) / (time.perf_counter() - began))
    return {
        "model": subject.name,
        "lookup_microseconds": lookup_microseconds(subject),
        "batch": len(conditions),
        "threads": torch.get_num_threads(),
        "images_per_second": rates,
    }


def lookup_microseconds(subject: Subject) -> float:
    """What the tables cost over a static scale, at each forward pass: mean over 1000 time steps."""
    model = load_quantized(subject.folder / "W8A8", backend="integer")
    quantizers = read_artifact(subject.folder / "W8A8").quantizers
    x, name = torch.empty(1), next(q.name for q in quantizers if q.name in model.step)
    began = time.perf_counter()
    for index in range(1000):
        with present_at(torch.tensor([float(index)])), model.step.call():
            model.step.interval(name, x)
    return 1e6 * (time.perf_counter() - began) / 1000


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown: speed over torch fp32 eager."""
    names = list(dict.fromkeys(name for line in lines for name in line["over_torch_fp32"]))
    rows = [f"| model | threads | batch | torch fp32 (ms) | {' | '.join(names[1:])} |", "|---" * (3 + len(names)) + "|"]
    for line in lines:
        speeds = " | ".join(f"{line['over_torch_fp32'].get(name, float('nan')):.2f}" for name in names[1:])
        start = f"| {line['model']} | {line['threads']} | {line['batch']} | {line['milliseconds']['torch fp32']:.1f}"
        rows.append(f"{start} | {speeds} |")
    for model in dict.fromkeys(line["model"] for line in lines):
        sizes = next(line["weights_over_fp32"] for line in lines if line["model"] == model)
        rows.append(f"\nWeights of {model} over float32: " + ", ".join(f"{k} {v:.3f}" for k, v in sizes.items()))
    return "\n".join(rows)


if __name__ == "__main__":
    main()
