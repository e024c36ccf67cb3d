"""The runtimes that run a file on the CPU, each as a function from a graph's inputs to its outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptq_tdq.errors import ModelError
from ptq_tdq.extras import need

Run = Callable[[dict[str, NDArray[Any]]], list[NDArray[Any]]]
QDQ = "qdq"  # what a graph says it was made for whose integer kernels the runtime makes itself
WEIGHTS = "weights.bin"  # the file that the graphs of a folder share


class NotRunError(ModelError):
    """A graph, or a call of it, that the runtime refuses; ``reason`` is what that says."""

    def __init__(self, runtime: str, error: Exception) -> None:
        self.reason = (str(error).strip() or type(error).__name__).splitlines()[-1].rstrip(".")[:200]
        super().__init__(
            f"{runtime} does not run this graph, or not with such sizes ({self.reason}); call it with others, or run "
            "it in another runtime."
        )


@contextmanager
def _refusals(runtime: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # runtimes raise types of their own
        raise NotRunError(runtime, error) from error


def open_onnxruntime(file: Path, threads: int, integers: bool = True) -> Run:
    """Run ``file`` with onnxruntime; ``threads`` 0 leaves their number to it.

    Without ``integers`` products between QuantizeLinear and DequantizeLinear are computed in floating point.
    """
    ort = need("onnxruntime", "onnx")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # what it would tell of an error is in the error
    options.add_session_config_entry("session.disable_quant_qdq", str(int(not integers)))
    # it rounds weights once more, in files that were written before we knew
    with _refusals("onnxruntime"):
        session = ort.InferenceSession(
            str(file), options, providers=["CPUExecutionProvider"], disabled_optimizers=["WeightBiasQuantization"]
        )
    known = {value.name for value in session.get_inputs()}

    def run(feed: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
        with _refusals("onnxruntime"):
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

    def compile_for(feed: dict[str, NDArray[Any]]) -> Any:
        model = core.read_model(str(file))
        model.reshape({name: list(value.shape) for name, value in feed.items()})
        try:
            return core.compile_model(model, "CPU", options)
        except RuntimeError as error:  # of fused operations that OpenVINO has no code for (Mish, with AVX512-BF16)
            if "snippets" not in str(error):
                raise
            return core.compile_model(model, "CPU", options | {"SNIPPETS_MODE": "DISABLE"})

    def run(feed: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
        shapes = tuple(value.shape for value in feed.values())
        with _refusals("OpenVINO"):
            if shapes not in compiled:
                compiled[shapes] = compile_for(feed)
            # copies: the results are views of memory that the next call writes to
            return [np.array(result) for result in compiled[shapes](feed).values()]

    return run


RUNTIMES: dict[str, Callable[[Path, int, bool], Run]] = {"onnxruntime": open_onnxruntime, "openvino": open_openvino}
