"""An exported file as a U-Net: what a diffusers pipeline needs of ``pipe.unet``."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ptq_tdq.errors import ModelError, UsageError
from ptq_tdq.export.extras import need
from ptq_tdq.export.onnx.file import METADATA
from ptq_tdq.export.onnx.skeleton import LABELS, SAMPLE, TIMESTEP
from ptq_tdq.processor import sums_eight_bits
from ptq_tdq.timeaxis import require_covered

Run = Callable[[dict[str, NDArray[Any]]], NDArray[np.float32]]


@dataclass
class OnnxUNetOutput:
    """The result, as diffusers' models return it."""

    sample: Tensor


class OnnxUNet(nn.Module):
    """``pipe.unet = OnnxUNet("model.onnx")``: runs a file of :func:`ptq_tdq.export.onnx.export_onnx` on the CPU.

    ``runtime`` is "onnxruntime" or "openvino"; by default the one that the file was made for (onnxruntime for portable
    files). ``threads`` 0 leaves their number to the runtime. Any scheduler, step count and batch size will do, and the
    time steps of a batch may differ. OpenVINO compiles the graph once for each shape of input.

    Raises :class:`ModelError` for a file that is none of ours or is for another runtime, :class:`UsageError` for a
    runtime that is unknown or not installed.
    """

    def __init__(self, file: str | Path, *, runtime: str | None = None, threads: int = 0) -> None:
        super().__init__()
        facts = _facts(Path(file))
        made_for = str(facts["runtime"])
        chosen = runtime or (made_for if made_for in _RUNTIMES else "onnxruntime")
        if chosen not in _RUNTIMES:
            raise UsageError(f"The runtime must be one of {', '.join(_RUNTIMES)}. Got {chosen!r} instead.")
        if made_for not in ("portable", "float", chosen):
            raise ModelError(f"'{file}' was exported for {made_for}; export it for {chosen}.")
        self.facts, self.runtime = facts, chosen
        self.config = SimpleNamespace(**facts["model_config"])
        self.dtype, self.device = torch.float32, torch.device("cpu")
        self._last = facts["num_train_timesteps"] - 1
        self._run = _RUNTIMES[chosen](Path(file), threads)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> OnnxUNetOutput | tuple[Tensor]:
        """``sample`` [B, C, H, W], ``timestep`` one number or [B], integer or fractional, ``class_labels`` [B].

        Raises :class:`~ptq_tdq.errors.TimestepError` for a time step outside the interval tables, and
        :class:`ModelError` for labels that are missing or superfluous.
        """
        t = torch.as_tensor(timestep, dtype=torch.float32).reshape(-1)
        require_covered(t, self._last)
        feed = {SAMPLE: sample.detach().float().cpu().numpy(), TIMESTEP: t.cpu().numpy()}
        if (class_labels is not None) != bool(self.config.num_class_embeds):
            needs = "needs" if class_labels is None else "takes no"
            raise ModelError(f"The model {needs} class_labels; call it as the model that it was made from.")
        if class_labels is not None:
            feed[LABELS] = class_labels.to(torch.int64).cpu().numpy()
        result = torch.from_numpy(self._run(feed)).to(sample.device, sample.dtype)
        return OnnxUNetOutput(result) if return_dict else (result,)


def _facts(file: Path) -> dict[str, Any]:
    try:
        model = onnx.load(file, load_external_data=False)
        facts: dict[str, Any] = json.loads({p.key: p.value for p in model.metadata_props}[METADATA])
    except OSError as error:
        reason = error.strerror or error
        raise ModelError(f"'{file}' cannot be read ({reason}); give the path of an ONNX file.") from error
    except Exception as error:  # protobuf's own type of error is private
        raise ModelError(f"'{file}' is not an ONNX file that `ptq-tdq export` has written.") from error
    return facts


def _onnxruntime(file: Path, threads: int) -> Run:
    ort = need("onnxruntime", "onnx")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if not sums_eight_bits():  # sums of 8-bit products would saturate silently
        options.add_session_config_entry("session.x64quantprecision", "1")
    session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

    def run(feed: dict[str, NDArray[Any]]) -> NDArray[np.float32]:
        result: NDArray[np.float32] = session.run(None, feed)[0]
        return result

    return run


def _openvino(file: Path, threads: int) -> Run:
    ov = need("openvino", "openvino")
    core = ov.Core()
    compiled: dict[tuple[tuple[int, ...], ...], Any] = {}
    # float32 between the integer layers, as in the simulated model; OpenVINO would choose bfloat16 where the CPU has it
    options = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    if threads:
        options["INFERENCE_NUM_THREADS"] = str(threads)

    def run(feed: dict[str, NDArray[Any]]) -> NDArray[np.float32]:
        shapes = tuple(value.shape for value in feed.values())
        if shapes not in compiled:
            model = core.read_model(str(file))
            model.reshape({name: list(value.shape) for name, value in feed.items()})
            compiled[shapes] = core.compile_model(model, "CPU", options)
        result: NDArray[np.float32] = compiled[shapes](feed)[0].copy()
        return result

    return run


_RUNTIMES: dict[str, Callable[[Path, int], Run]] = {"onnxruntime": _onnxruntime, "openvino": _openvino}
