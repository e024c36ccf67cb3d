"""What a file says of itself, checked as what somebody else may have written."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import onnx

from ptq_tdq.errors import ModelError
from ptq_tdq.export.onnx.signature import Kind, Leaf, Signature
from ptq_tdq.timeaxis import TimeAxis


@dataclass(frozen=True)
class Facts:
    """``said`` is all of it; the rest is what a denoiser needs of that.

    ``made_for`` is a runtime, ``steps`` are the time steps of a graph in which intervals are constants.
    """

    said: dict[str, Any]
    made_for: str
    call: Signature
    parameters: inspect.Signature
    axis: TimeAxis
    model_config: dict[str, Any]
    free_sizes: tuple[str, ...]
    one_step: bool
    steps: tuple[float, ...] | None

    @classmethod
    def of(cls, said: Any, graph: onnx.GraphProto, file: Path) -> Facts:
        """Raises :class:`ModelError` for what no export writes, or what is not true of the graph."""
        try:
            call, steps = Signature.from_dict(said["call"]), said.get("steps")
            found = cls(
                said=said,
                made_for=_of(str, said["runtime"]),
                call=call,
                parameters=inspect.Signature([_parameter(p) for p in call.parameters]),
                axis=TimeAxis.from_dict(said["time_axis"]),
                model_config=_of(dict, said["model_config"]),
                free_sizes=tuple(_of(str, name) for name in _of(list, said["free_sizes"])),
                one_step=_of(bool, said["one_step"]),
                steps=None if steps is None else tuple(float(_of(int | float, step)) for step in _of(list, steps)),
            )
            _check(found, graph)
        except (AttributeError, KeyError, OverflowError, RecursionError, TypeError, ValueError) as error:
            raise ModelError(
                f"'{file}' says of itself what no export writes ({type(error).__name__}: {str(error)[:100]!r}); "
                "export it again."
            ) from None
        return found


def _check(facts: Facts, graph: onnx.GraphProto) -> None:
    """Raise TypeError or ValueError unless all is of its type and the graph is called as they say."""
    call = facts.call
    leaves = call.tensors()
    _of(dict, call.arguments), _of(bool, call.checked)
    for text in (call.main, *call.fields, *call.arguments):
        _of(str, text)
    for leaf in (*leaves, *call.results()):
        _check_leaf(leaf)
    ranks = {x.name: len(x.type.tensor_type.shape.dim) for x in graph.input}
    inputs = {leaf.name: leaf for leaf in call.leaves()}
    if inputs.keys() != ranks.keys() or any(leaf.dim >= max(1, ranks[name]) for name, leaf in inputs.items()):
        raise ValueError("the graph has other inputs")
    if [x.name for x in graph.output] != call.output_names():
        raise ValueError("the graph has other outputs")
    for leaf, output in zip(call.results(), graph.output, strict=False):
        rank = len(output.type.tensor_type.shape.dim)
        if leaf.kind == "each" or (leaf.kind == "rows" and leaf.dim >= rank):
            raise ValueError("the graph has outputs with other axes")
    if call.time not in inputs or not any(name.partition(".")[0] == call.main for name in inputs):
        raise ValueError("no input is the time, or none is denoised")
    if len({len(leaf.held) for leaf in call.held()}) > 1:
        raise ValueError("it holds values of different numbers of samples")


def _check_leaf(leaf: Leaf) -> None:
    for text in (leaf.name, *leaf.held):
        _of(str, text)
    if leaf.kind not in get_args(Kind) or _of(int, leaf.dim) < 0:
        raise ValueError(f"{leaf.name} is no tensor of a call")
    _of(bool, leaf.several), _of(bool, leaf.complex)


def _of(kind: Any, value: Any) -> Any:
    """``value``, if it is of this type; truth values are no numbers."""
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise TypeError(f"{value!r:.40} is of another type")
    return value


def _parameter(stored: dict[str, Any]) -> inspect.Parameter:
    kind = inspect._ParameterKind[stored["kind"]]
    return inspect.Parameter(stored["name"], kind, default=stored.get("default", inspect.Parameter.empty))
