"""The runtimes that run a file on the CPU, each as a function from a graph's inputs to its outputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptq_tdq.extras import need

Run = Callable[[dict[str, NDArray[Any]]], list[NDArray[Any]]]
QDQ = "qdq"  # what a graph says it was made for whose integer kernels the runtime makes itself
WEIGHTS = "weights.bin"  # the file that the graphs of a folder share


def open_onnxruntime(file: Path, threads: int, integers: bool = True) -> Run:
    """Run ``file`` with onnxruntime; ``threads`` 0 leaves their number to it.

    Without ``integers`` products between QuantizeLinear and DequantizeLinear are computed in floating point.
    """
    ort = need("onnxruntime", "onnx")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_quant_qdq", str(int(not integers)))
    # it rounds weights once more, in files that were written before we knew
    session = ort.InferenceSession(
        str(file), options, providers=["CPUExecutionProvider"], disabled_optimizers=["WeightBiasQuantization"]
    )
    known = {value.name for value in session.get_inputs()}

    def run(feed: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
        results: list[NDArray[Any]] = session.run(None, {k: v for k, v in feed.items() if k in known})
        return results

    return run


def open_openvino(file: Path, threads: int, integers: bool = True) -> Run:
    """Run ``file`` with OpenVINO, which compiles the graph once for each shape of its inputs."""
    ov = need("openvino", "openvino")
    core = ov.Core()
    compiled: dict[tuple[tuple[int, ...], ...], Any] = {}
    # float32 between the integer layers, as in the simulated model; OpenVINO would choose bfloat16 where the CPU has it
    options = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    if threads:
        options["INFERENCE_NUM_THREADS"] = str(threads)

    def run(feed: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
        shapes = tuple(value.shape for value in feed.values())
        if shapes not in compiled:
            model = core.read_model(str(file))
            model.reshape({name: list(value.shape) for name, value in feed.items()})
            try:
                compiled[shapes] = core.compile_model(model, "CPU", options)
            except RuntimeError as error:  # of fused operations that OpenVINO has no code for (Mish, with AVX512-BF16)
                if "snippets" not in str(error):
                    raise
                compiled[shapes] = core.compile_model(model, "CPU", options | {"SNIPPETS_MODE": "DISABLE"})
        # copies: the results are views of memory that the next call writes to
        return [np.array(result) for result in compiled[shapes](feed).values()]

    return run


RUNTIMES: dict[str, Callable[[Path, int, bool], Run]] = {"onnxruntime": open_onnxruntime, "openvino": open_openvino}
