"""A graph is run once before anybody is given it: what an exporter writes is not always what a runtime takes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ptq_tdq.calls import Calls, prediction
from ptq_tdq.errors import ModelError, PtqTdqError, RuntimeUnsupportedError
from ptq_tdq.export.onnx.denoiser import OnnxDenoiser
from ptq_tdq.timed_model import in_float32

MOST_NOISE = 0.1  # of the energy; codes that fall on the other side of a tie leave less, even in deep random models


def try_out(graph: bytes, calls: Calls, simulated: Callable[..., Any]) -> None:
    """As :func:`try_file`, for a graph that is no file yet."""
    with TemporaryDirectory(prefix="ptq-tdq-") as folder:
        file = Path(folder) / "graph.onnx"
        file.write_bytes(graph)
        try_file(file, calls, simulated)


def try_file(file: Path, calls: Calls, simulated: Callable[..., Any]) -> None:
    """Run a file on one of the recorded calls, alone and twice, where its runtime is right on this processor.

    Raises :class:`ModelError` for a graph that the runtime does not run, and for one that computes something else than
    the ``simulated`` model.
    """
    try:
        denoiser = OnnxDenoiser(file)
        for rows in ([0], [0, 0]):  # other numbers of samples than the graph was traced with
            inputs = in_float32(calls.inputs(torch.tensor(rows)))
            with torch.no_grad():
                expected, found = prediction(simulated(**inputs)), prediction(denoiser(**inputs))
            noise = float((found - expected).square().mean() / expected.square().mean().clamp(min=1e-30))
            if not noise < MOST_NOISE:
                raise ModelError(
                    f"The graph that torch exports of this model computes something else (noise {noise:.2g} of the "
                    'energy); run the model itself with load_quantized(path, backend="integer").'
                )
    except RuntimeUnsupportedError:
        return
    except PtqTdqError:
        raise
    except Exception as error:  # runtimes raise types of their own
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1][:200]
        raise ModelError(
            f"The runtime does not run the graph that torch exports of this model ({reason}); run the model itself "
            'with load_quantized(path, backend="integer").'
        ) from error
