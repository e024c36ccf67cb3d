"""A graph is run once before anybody is given it: what an exporter writes is not always what a runtime takes."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from ptq_tdq.calls import Calls
from ptq_tdq.errors import ModelError, PtqTdqError, RuntimeUnsupportedError
from ptq_tdq.export.onnx.denoiser import OnnxDenoiser


def try_out(graph: bytes, calls: Calls) -> None:
    """As :func:`try_file`, for a graph that is no file yet."""
    with TemporaryDirectory(prefix="ptq-tdq-") as folder:
        file = Path(folder) / "graph.onnx"
        file.write_bytes(graph)
        try_file(file, calls)


def try_file(file: Path, calls: Calls) -> None:
    """Run a file on one of the recorded calls, alone and twice, where its runtime is right on this processor.

    Raises :class:`ModelError` for a graph that the runtime does not run.
    """
    try:
        denoiser = OnnxDenoiser(file)
        for rows in ([0], [0, 0]):  # other numbers of samples than the graph was traced with
            denoiser(**calls.inputs(torch.tensor(rows)))
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
