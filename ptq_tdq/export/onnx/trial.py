"""A graph is run once before anybody is given it: what an exporter writes is not always what a runtime takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ptq_tdq.calls import Calls, fresh, prediction
from ptq_tdq.errors import ModelError, RuntimeUnsupportedError
from ptq_tdq.export.onnx.denoiser import OnnxDenoiser
from ptq_tdq.export.onnx.runtimes import NotRunError
from ptq_tdq.export.onnx.skeleton import BATCH, ROWS_OF, longer
from ptq_tdq.timed_model import in_float32

MOST_NOISE = 0.1  # of the energy; codes that fall on the other side of a tie leave less, even in deep random models
MOST_OF_OTHER_SIZES = 0.003  # where a graph has more, the size is a fixed one: no more than that is lost


def try_out(graph: bytes, calls: Calls, simulated: Callable[..., Any]) -> set[str]:
    """As :func:`try_file`, for a graph that is no file yet."""
    with TemporaryDirectory(prefix="ptq-tdq-") as folder:
        file = Path(folder) / "graph.onnx"
        file.write_bytes(graph)
        return try_file(file, calls, simulated)


@torch.no_grad()
def try_file(file: Path, calls: Calls, simulated: Callable[..., Any]) -> set[str]:
    """Run a file on one of the recorded calls, alone and twice, where its runtime is right on this processor.

    Returns the names of its free sizes that are none: at another one it is wrong, or does not run. Raises
    :class:`ModelError` for a graph that the runtime does not run, and for one that computes something else than the
    ``simulated`` model.
    """
    try:
        denoiser = OnnxDenoiser(file)
        for rows in ([0], [0, 0]):  # other numbers of samples than the graph was traced with
            inputs = in_float32(calls.inputs(torch.tensor(rows)))
            noise = _noise(denoiser(**inputs), simulated(**inputs))
            if not noise < MOST_NOISE:
                raise ModelError(
                    f"The graph that torch exports of this model computes something else (noise {noise:.2g} of the "
                    'energy); run the model itself with load_quantized(path, backend="integer").'
                )
        one = in_float32(calls.inputs(torch.tensor([0])))
        free = [n for n in denoiser.facts["free_sizes"] if n != BATCH and not n.startswith(ROWS_OF)]
        return {name for name in free if not _right(denoiser, simulated, longer(denoiser.call, one, name))}
    except RuntimeUnsupportedError:
        return set()
    except NotRunError as error:
        raise ModelError(
            f"The runtime does not run the graph that torch exports of this model ({error.reason}); run the model "
            'itself with load_quantized(path, backend="integer").'
        ) from error


def _noise(found: Any, expected: Any) -> float:
    """The energy of the difference of two predictions, in that of the expected one."""
    x, y = prediction(found), prediction(expected)
    if x.shape != y.shape:
        return math.inf
    return float((x - y).square().mean() / y.square().mean().clamp(min=1e-30))


def _right(denoiser: OnnxDenoiser, simulated: Callable[..., Any], calls: Iterable[dict[str, Any]]) -> bool:
    """Whether a file runs one of some calls, and is right in all that it and the model take."""
    noises = []
    for inputs in calls:
        try:
            expected = simulated(**fresh(inputs))
        except Exception:  # of many unrelated types, and any of them means that the model does not take the call
            continue
        with suppress(ModelError):
            noises.append(_noise(denoiser(**inputs), expected))
    return bool(noises) and max(noises) < MOST_OF_OTHER_SIZES
