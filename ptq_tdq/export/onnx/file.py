"""The ONNX file: made, checked and written in one piece."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import onnx
import onnx_ir as ir
import torch
from torch import nn

from ptq_tdq.artifacts import Artifact
from ptq_tdq.atomic import Contents, publish_directory, write_atomic
from ptq_tdq.calls import Calls
from ptq_tdq.errors import ModelError, UsageError, first_line
from ptq_tdq.export.onnx.by_step import SharedWeights, Static, frozen, groups_of_steps
from ptq_tdq.export.onnx.floating import Floating
from ptq_tdq.export.onnx.lowering import lower, of_one_step
from ptq_tdq.export.onnx.onnxruntime_form import OnnxRuntime
from ptq_tdq.export.onnx.openvino_form import OpenVINO
from ptq_tdq.export.onnx.outputs import Outputs, outputs_of
from ptq_tdq.export.onnx.portable import Portable
from ptq_tdq.export.onnx.runtimes import QDQ, WEIGHTS
from ptq_tdq.export.onnx.skeleton import METADATA, Skeleton, make_skeleton
from ptq_tdq.export.onnx.trial import try_file, try_out
from ptq_tdq.export.tables import export_tables, interval_frame
from ptq_tdq.load import Given, as_artifact, build_quantized
from ptq_tdq.quantized_model import QuantizedModel

T = TypeVar("T")
_log = logging.getLogger(__name__)
FORMS: dict[str, type[Portable]] = {"portable": Portable, "onnxruntime": OnnxRuntime, "openvino": OpenVINO}
_STEPS = Contents("graphs for time steps", ("t*.onnx", WEIGHTS))


def export_onnx(
    artifact: Given, file: str | Path, runtime: str, calls: Calls, *, model: nn.Module | None = None
) -> None:
    """Write ``artifact`` as one ONNX graph for one of :data:`FORMS`. A file that is there is replaced.

    ``artifact`` is a folder, a hub id, what :func:`~ptq_tdq.calibrate` gave, or an artifact in memory.
    ``model`` is an instance of a class that is not diffusers' own, as :func:`~ptq_tdq.load_quantized` takes it.
    ``calls`` are recorded calls of the model, of which one is enough: the graph's inputs are the tensors of its
    arguments, by name (``sample``, ``added_cond_kwargs.text_embeds``), in float32 where they are real; plain values
    are part of the graph, and so are tensors whose values the model's code reads (a log message names them). The
    batch may vary, and so may the size of images where the model takes others and the graph is right there; all other
    sizes (tokens of a prompt, say) are those of ``calls``. The outputs are the tensors that the model returns, ``out_``
    and the name of their field. The tensor ``<quantizer>.codes`` holds the integers of each quantizer, ``<layer>`` the
    output of each quantized layer.

    Raises :class:`UsageError` for an unknown runtime, :class:`ModelError` for a model that cannot be expressed and
    :class:`~ptq_tdq.errors.OutputError` when the file cannot be written.
    """
    if runtime not in FORMS:
        raise UsageError(f"The runtime must be one of {', '.join(FORMS)}. Got {runtime!r} instead.")
    artifact = as_artifact(artifact)
    for name in artifact.networks:
        raise ModelError(
            f"The quantizer '{name}' asks a network for its interval at run time, which has no ONNX form; "
            "choose an artifact with another method."
        )
    for name in artifact.by_token:
        raise ModelError(
            f"The quantizer '{name}' finds an interval for each token at run time, which has no ONNX form; "
            "choose an artifact with another method."
        )
    graph = _of_right_sizes(
        lambda fixed: encode_onnx(artifact, FORMS[runtime], make_skeleton(artifact, calls, model, fixed), runtime),
        lambda graph: try_out(graph, calls, _in_float32(artifact, model)),
    )
    write_atomic(file, graph)


def export_onnx_float(artifact: Given, file: str | Path, calls: Calls, *, model: nn.Module | None = None) -> Path:
    """Write the graph in floating point, with the names of the interval table, and the table as CSV beside it.

    :mod:`ptq_tdq.export.onnx.floating` says how the two belong together. Returns the path of the table: that of
    ``file`` with the suffix ``.csv``. Raises :class:`UsageError` for dynamic quantizers, which have no table, and as
    :func:`export_onnx` does.
    """
    table = Path(file).with_suffix(".csv")
    if table == Path(file):
        raise UsageError(f"The interval table goes to '{table}'; name the graph '{table.stem}.onnx' instead.")
    artifact = as_artifact(artifact)
    interval_frame(artifact)  # the cheap reason to refuse comes first
    graph = _of_right_sizes(
        lambda fixed: encode_onnx(artifact, Floating, make_skeleton(artifact, calls, model, fixed), "float"),
        lambda graph: try_out(graph, calls, _weights_alone(artifact, model)),
    )
    export_tables(artifact, table, "csv")
    write_atomic(file, graph)
    return table


def export_onnx_steps(
    artifact: Given,
    folder: str | Path,
    calls: Calls,
    *,
    model: nn.Module | None = None,
    overwrite: bool = False,
    int8_outputs: bool = False,
) -> list[list[float]]:
    """Write a folder of static graphs (``t0981.onnx``, ...) for the time steps of ``calls``, and their weights.

    :mod:`ptq_tdq.export.onnx.by_step` says what they are. With ``int8_outputs`` convolutions give 8 bits over the range
    that their outputs have in ``calls``, which should hold some samples then: onnxruntime runs only such convolutions
    in integers. Returns the steps of each graph. Raises :class:`ModelError` for dynamic quantizers, and as
    :func:`export_onnx` does.
    """
    artifact = as_artifact(artifact)
    groups = groups_of_steps(artifact, [float(t) for t in calls.t.unique()])
    quantized = _in_float32(artifact, model)

    def write(fixed: set[str]) -> Skeleton:
        skeleton = make_skeleton(artifact, calls, model, fixed)
        write_steps(artifact, target, skeleton, groups)
        return skeleton

    with publish_directory(folder, _STEPS if overwrite else None) as target:
        skeleton = _of_right_sizes(write, lambda _: try_file(target, calls, quantized))
        if int8_outputs:
            of_groups = (torch.isin(calls.t, torch.tensor(steps, dtype=calls.t.dtype)) for steps in groups)
            outputs = [outputs_of(quantized, calls.select(rows.nonzero().flatten())) for rows in of_groups]
            write_steps(artifact, target, skeleton, groups, outputs)
            try_file(target, calls, quantized)  # of the same sizes: codes that fall elsewhere are more than their bar
    return groups


def _weights_alone(artifact: Artifact, model: nn.Module | None) -> QuantizedModel:
    return _in_float32(artifact, model).quantize(activations=False)


def _in_float32(artifact: Artifact, model: nn.Module | None) -> QuantizedModel:
    """The simulated model in the dtype of graphs, of whatever dtype the artifact is."""
    return build_quantized(artifact, model).float()


def _of_right_sizes(make: Callable[[set[str]], T], wrong: Callable[[T], set[str]]) -> T:
    """What ``make`` gives with so many fixed sizes that none of its free ones is ``wrong``."""
    fixed: set[str] = set()
    while found := wrong(made := make(fixed)):
        _log.warning(
            "The graph takes %s as in these calls alone: torch's export is of no other.", " and ".join(sorted(found))
        )
        fixed |= found
    return made


def write_steps(
    artifact: Artifact,
    folder: Path,
    skeleton: Skeleton,
    groups: list[list[float]],
    outputs: list[Outputs] | None = None,
) -> None:
    """The files of a folder, one graph for each group of steps; ``skeleton`` is of the same artifact.

    ``outputs`` are the intervals of layers' outputs in each group; those of the graph stay in floating point.
    """
    weights = SharedWeights(folder)
    for steps, own in zip(groups, outputs or [Outputs()] * len(groups), strict=True):
        inner = {name: intervals for name, intervals in own.items() if name not in skeleton.ends}
        lowered = lower(skeleton, frozen(artifact, steps[0]), Static, outputs=inner)
        lowered.metadata_props[METADATA] = json.dumps({**_facts(artifact, skeleton, QDQ, Static), "steps": steps})
        weights.take(lowered)
        file = folder / f"t{steps[0]:04g}.onnx"
        file.write_bytes(_serialized(lowered))
        _check(file)


def encode_onnx(artifact: Artifact, form: type[Portable], skeleton: Skeleton, runtime: str) -> bytes:
    """The file's bytes; ``skeleton`` is of the same artifact, ``runtime`` what the file says that it is for."""
    model = lower(skeleton, artifact, form)
    model.metadata_props[METADATA] = json.dumps(_facts(artifact, skeleton, runtime, form))
    data = _serialized(model)
    _check(data)
    return data


def _serialized(model: ir.Model) -> bytes:
    proto = ir.to_proto(model)
    try:
        data: bytes = proto.SerializeToString(deterministic=True)
    except ValueError as error:
        raise ModelError(f"The model does not fit into the 2 GB of an ONNX file ({error}).") from error
    return data


def _check(model: bytes | Path) -> None:
    try:
        onnx.checker.check_model(model, full_check=True)
    except Exception as error:  # of several unrelated types, from C++
        said = first_line(error)
        raise ModelError(f"torch has exported the model to a graph that is not valid ONNX ({said}).") from error


def _facts(artifact: Artifact, skeleton: Skeleton, runtime: str, form: type[Portable]) -> dict[str, Any]:
    keys = ("base_model", "model_config", "scheme", "method", "versions", "time_axis")
    return {
        "runtime": runtime,
        "call": skeleton.signature.to_dict(),
        "free_sizes": skeleton.free,
        "one_step": of_one_step(artifact, form),
        **{key: artifact.config[key] for key in keys},
    }
