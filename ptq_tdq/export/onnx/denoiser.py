"""An exported file as a denoiser: what a diffusers pipeline needs of ``pipe.unet`` or ``pipe.transformer``."""

from __future__ import annotations

import inspect
import json
import math
from collections import namedtuple
from contextlib import suppress
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ptq_tdq.errors import ArtifactMismatchError, ModelError, RuntimeUnsupportedError, TimestepError, UsageError
from ptq_tdq.export.onnx.facts import Facts
from ptq_tdq.export.onnx.places import alike, places_of, rounds
from ptq_tdq.export.onnx.runtimes import QDQ, RUNTIMES, WEIGHTS, Run
from ptq_tdq.export.onnx.signature import RETURN_DICT, Leaf
from ptq_tdq.export.onnx.skeleton import BATCH, METADATA
from ptq_tdq.processor import instruction_set, sums_eight_bits
from ptq_tdq.structure import TensorCounts, building, meta_model
from ptq_tdq.timeaxis import NEAR
from ptq_tdq.timed_model import check_finite

Feed = dict[str, NDArray[Any]]


class Attributes(dict[str, Any]):
    """A dictionary whose entries are attributes too, as those of diffusers' configurations are."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class DenoiserOutput(Attributes):
    """What a denoiser returns: tensors by name, as attributes, or by their place."""

    def __getitem__(self, key: Any) -> Any:
        return list(self.values())[key] if isinstance(key, int | slice) else super().__getitem__(key)


@cache
def _of_fields(names: tuple[str, ...]) -> Any:
    """The class of tuples whose items have names, as some models' outputs."""
    return namedtuple("Output", names, rename=True)


class OnnxDenoiser(nn.Module):
    """``pipe.unet = OnnxDenoiser("model.onnx")``: runs a file of :func:`ptq_tdq.export.onnx.export_onnx` on the CPU.

    Or a folder of :func:`ptq_tdq.export.onnx.export_onnx_steps`: each call takes the graph of its own time step.

    It is called as the model that the file was made from, and returns what that returns. Whatever else a pipeline asks
    of its denoiser (``cache_context``, the size of a layer) is asked of the model without its weights, where that is
    one of diffusers. ``runtime`` is "onnxruntime" or "openvino"; by default the one that the file was made for
    (onnxruntime for portable files). ``threads`` 0 leaves their number to the runtime. Any scheduler, step count and
    batch size will do, and the time steps of a batch may differ; ``facts["free_sizes"]`` says which other sizes may.
    OpenVINO compiles the graph once for each shape.

    Raises :class:`ModelError` for a file that is none of ours or is for another runtime, :class:`UsageError` for an
    unknown runtime, :class:`~ptq_tdq.errors.MissingExtraError` for one that is not installed, and
    :class:`RuntimeUnsupportedError` for a file that this processor does not compute exactly.
    """

    def __init__(self, file: str | Path, *, runtime: str | None = None, threads: int = 0) -> None:
        super().__init__()
        files = _files(Path(file))
        graphs = [_read(each) for each in files]
        (graph, facts), of_steps = graphs[0], [found.steps for _, found in graphs]
        chosen = runtime or (facts.made_for if facts.made_for in RUNTIMES else "onnxruntime")
        if chosen not in RUNTIMES:
            raise UsageError(f"The runtime must be one of {', '.join(RUNTIMES)}. Got {chosen!r} instead.")
        if facts.made_for not in ("portable", "float", QDQ, chosen):
            raise ModelError(f"'{file}' was exported for {facts.made_for}; export it for {chosen}.")
        if Path(file).is_dir() and None in of_steps:
            raise ModelError(f"'{file}' has graphs that are not for some time steps alone; give the path of one.")
        exact = sums_eight_bits()
        if not exact and (facts.made_for in RUNTIMES or (facts.made_for, chosen) == (QDQ, "openvino")):
            raise RuntimeUnsupportedError(
                f"'{file}' has 8-bit products, whose sums {chosen} lets saturate on this processor "
                f"({instruction_set()}, no VNNI); export it with --runtime portable."
            )
        self.facts, self.runtime = facts.said, chosen
        self._opened = partial(OnnxDenoiser, file, runtime=chosen, threads=threads)
        self.config = Attributes(facts.model_config)
        self.dtype, self.device = torch.float32, torch.device("cpu")
        self.call, self.axis, self._signature = facts.call, facts.axis, facts.parameters
        self._structure = cache(partial(_structure, self.config, self.call.time, _counts(graph)))
        self._inputs = {value.name: value.type.tensor_type for value in graph.input}
        self._tables = _tables(graph)
        self._one_step, self._any_batch = facts.one_step or facts.steps is not None, BATCH in facts.free_sizes
        integers = exact or facts.made_for != QDQ
        self._graphs = list(zip(of_steps, [RUNTIMES[chosen](f, threads, integers) for f in files], strict=True))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's own forward.

        Raises :class:`~ptq_tdq.errors.TimestepError` for a time step outside the interval tables,
        :class:`~ptq_tdq.errors.NonFiniteError` for NaN or Inf, and :class:`ModelError` for arguments other than those
        of the recorded calls, or with which the runtime does not run the graph.
        """
        arguments = self._bind(args, kwargs)
        return_dict = arguments.pop(RETURN_DICT, False)
        self.axis.t(arguments.get(self.call.time))  # refuses what is no time step, and what the tables do not cover
        feed: Feed = {}
        self._fill(self.call.arguments, _repeated(self.call.arguments, arguments, self.call.main), "", feed)
        results = [self._as_given(torch.from_numpy(result), arguments) for result in self._rows(feed)]
        return self._returned(results, len(arguments[self.call.main]), bool(return_dict))

    def __reduce__(self) -> Any:
        """A copy, also in another process, opens the file again."""
        return self._opened, ()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            model = None if "_structure" not in vars(self) else self._structure()
            if model is None:
                raise
            return getattr(model, name)

    def _bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments by name, with defaults for what is left out."""
        try:
            bound = self._signature.bind(*args, **kwargs)
        except TypeError as error:
            raise ModelError(f"The graph is called as its model, which takes other arguments ({error}).") from None
        bound.apply_defaults()
        found: dict[str, Any] = {}
        for name, value in bound.arguments.items():
            kind = self._signature.parameters[name].kind
            if kind is inspect.Parameter.VAR_KEYWORD:
                found |= value
            elif kind is not inspect.Parameter.VAR_POSITIONAL or value:
                found[name] = value
        for name, value in found.items():
            recorded = name in self.call.arguments or name == RETURN_DICT
            default = getattr(self._signature.parameters.get(name), "default", None)
            if not recorded and not _same(value, default):
                raise ModelError(f"The graph takes no {name}; export it with calls that have one.")
        return found

    def _fill(self, tree: Any, value: Any, name: str, feed: Feed) -> None:
        """Put the tensors of ``value`` into ``feed`` by the names that ``tree`` has for them."""
        if isinstance(tree, Leaf):
            feed[tree.name] = self._array(tree, value)
        elif isinstance(tree, dict):
            given = value if isinstance(value, dict) else {}
            for key, inner in tree.items():
                self._fill(inner, given.get(key), f"{name}.{key}" if name else key, feed)
        elif isinstance(tree, list | tuple):
            if not isinstance(value, list | tuple) or len(value) != len(tree):
                raise ModelError(f"The graph needs {name} with {len(tree)} entries, as in the calls of its export.")
            for i, inner in enumerate(tree):
                self._fill(inner, value[i], f"{name}.{i}", feed)
        elif not _same(value, tree):
            raise ModelError(
                f"The graph was exported with {name} = {tree!r}. Got {value!r}; export it with such calls."
            )

    def _array(self, leaf: Leaf, value: Any) -> Any:
        """The tensor of one input in its dtype; of a list with one for each sample, a list."""
        if value is None:
            raise ModelError(f"The graph needs {leaf.name}; call it as the model that it was made from.")
        if leaf.kind == "each":
            return [self._array(replace(leaf, kind="shared"), item) for item in value]
        tensor = leaf.real(torch.as_tensor(value).detach().cpu())
        check_finite(tensor)
        array: NDArray[Any] = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
        if leaf.held:
            return array
        kind = self._inputs[leaf.name]
        array = self._as_taken(leaf.name, array, onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type))
        if leaf.name == self.call.time and array.ndim < 2:
            return array.reshape(-1)
        sizes = [dim.dim_value for dim in kind.shape.dim]
        if leaf.kind == "rows":
            sizes[leaf.dim] = 0
        if array.ndim != len(sizes) or any(size and size != n for size, n in zip(sizes, array.shape, strict=True)):
            wanted = ", ".join(str(size or "any") for size in sizes)
            raise ModelError(
                f"The graph takes {leaf.name} in the shape [{wanted}]. Got {list(array.shape)}; export it with "
                "such calls."
            )
        return array

    def _as_taken(self, name: str, given: NDArray[Any], dtype: Any) -> NDArray[Any]:
        """An array in the dtype of the graph's input; whole numbers, and those that a table has, where it looks up."""
        array = given.astype(dtype)
        if array.dtype.kind == "i" and not (array == given).all():
            raise ModelError(f"The graph takes {name} in whole numbers. Got {given.dtype}; round them.")
        rows = self._tables.get(name)
        if rows is not None and not ((array >= 0) & (array < rows)).all():
            raise ModelError(f"The graph takes {name} from 0 to {rows - 1}. Got {array.min()} to {array.max()}.")
        return array

    def _as_given(self, result: Tensor, arguments: dict[str, Any]) -> Tensor:
        """A result where the arguments are; real numbers in the dtype of the first of them that are real, beside t."""
        values = [value for name, value in arguments.items() if name != self.call.time]
        tensors = [x for x in pytree.tree_leaves(values) if isinstance(x, Tensor)]
        real = next((x.dtype for x in tensors if x.is_floating_point()), self.dtype)
        return result.to(tensors[0].device, real if result.is_floating_point() else result.dtype)

    def _rows(self, feed: Feed) -> list[NDArray[Any]]:
        """The outputs for all samples: at once, or as many at a time as the graph is of, or as share a time step."""
        leaves, outputs, time = self.call.leaves(), self.call.results(), self.call.time
        main = next(leaf.name for leaf in leaves if leaf.name.partition(".")[0] == self.call.main)
        count = len(feed[main])
        if not count:
            raise ModelError("The graph was given no sample; call it with at least one.")
        feed = {leaf.name: leaf.of_samples(feed[leaf.name], count) for leaf in self.call.tensors()}
        apart = self._one_step and bool((feed[time] != feed[time][:1]).any())
        if self._any_batch and not apart:
            return self._run({leaf.name: feed[leaf.name] for leaf in leaves})
        found: dict[int, list[NDArray[Any]]] = {}
        places = places_of(self.call.held(), feed, count)
        groups = alike(feed[time]) if apart else [list(range(count))]
        for samples in groups if self._any_batch else (r for g in groups for r in rounds(places, self.call.samples, g)):
            results = self._run({leaf.name: leaf.some(feed[leaf.name], samples, count) for leaf in leaves})
            for place, sample in enumerate(samples):
                if self._any_batch or places[sample] == place:
                    found[sample] = [x.some(r, [place], len(samples)) for x, r in zip(outputs, results, strict=True)]
        return [x.joined([found[i][at] for i in range(count)]) for at, x in enumerate(outputs)]

    def _run(self, feed: Feed) -> list[NDArray[Any]]:
        """The outputs of the graph, or of that for the step of all rows."""
        steps, run = self._graphs[0]
        results = (run if steps is None else self._of_step(feed))(feed)
        if self.call.checked and not results.pop().all():
            raise ModelError(
                "The model's code decides by values of its arguments, and otherwise than in the calls of the graph's "
                "export; export it with such calls."
            )
        return results

    def _of_step(self, feed: Feed) -> Run:
        t = float(self.axis.t(torch.from_numpy(feed[self.call.time]))[0])
        for steps, run in self._graphs:
            if any(abs(t - step) < NEAR for step in steps or []):
                return run
        known = ", ".join(f"{step:g}" for step in sorted(step for steps, _ in self._graphs for step in steps or []))
        raise TimestepError(f"There is no graph for t = {t:g}, only for {known}; export those steps too.")

    def _returned(self, results: list[Tensor], samples: int, return_dict: bool) -> Any:
        """The results in the tree that the model returns."""
        found = dict(zip(self.call.output_names(), results, strict=False))
        lists = any(leaf.kind == "each" for leaf in self.call.tensors())

        def fill(tree: Any) -> Any:
            if isinstance(tree, Leaf):
                return found[tree.name]
            if isinstance(tree, list) and lists and len(tree) == 1:  # one tensor for each sample
                return list(fill(tree[0]).chunk(samples))
            if isinstance(tree, list | tuple):
                return type(tree)(map(fill, tree))
            return {key: fill(item) for key, item in tree.items()} if isinstance(tree, dict) else tree

        returned = fill(self.call.outputs)
        if return_dict and self.call.fields:
            values = [returned] if isinstance(returned, Tensor) else returned  # some models give a bare one for False
            values = values.values() if isinstance(values, dict) else values  # or an object all the same
            return DenoiserOutput(zip(self.call.fields, values, strict=False))
        plain = any(parameter["name"] == RETURN_DICT for parameter in self.call.parameters)
        named = not plain and isinstance(returned, tuple) and len(returned) == len(self.call.fields)
        return _of_fields(self.call.fields)(*returned) if named else returned


def _tables(graph: onnx.GraphProto) -> dict[str, int]:
    """The inputs that are looked up in a table (classes), and how many rows that has: runtimes do not refuse others."""
    rows = {tensor.name: tensor.dims[0] for tensor in graph.initializer if tensor.dims}
    casts = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Cast"}
    looks = [node.input for node in graph.node if node.op_type == "Gather" and node.input[0] in rows]
    found = {casts.get(where, where): rows[table] for table, where in looks}
    return {value.name: found[value.name] for value in graph.input if value.name in found}


def _counts(graph: onnx.GraphProto) -> TensorCounts:
    return TensorCounts(len(graph.initializer), sum(math.prod(tensor.dims) for tensor in graph.initializer))


def _structure(config: dict[str, Any], time: str, counts: TensorCounts) -> nn.Module | None:
    """The model of a file without its weights, where it is one of diffusers."""
    with suppress(ArtifactMismatchError), building():
        return meta_model(config, time, counts)
    return None


def _repeated(recorded: dict[str, Any], given: dict[str, Any], main: str) -> dict[str, Any]:
    """The arguments with each plain list that says the same of every sample (its size, say) as long as the recorded."""
    samples = given.get(main)
    count = len(samples) if isinstance(samples, list) or (isinstance(samples, Tensor) and samples.ndim) else 0

    def as_recorded(tree: Any, value: Any) -> Any:
        plain = not any(isinstance(leaf, Leaf | Tensor) for leaf in pytree.tree_leaves((tree, value)))
        if not plain or not isinstance(tree, list) or not isinstance(value, list) or len(value) != count:
            return value
        alike = all(item == items[0] for items in (tree, value) for item in items)
        return value[:1] * len(tree) if alike else value

    return {name: as_recorded(recorded.get(name), value) for name, value in given.items()}


def _same(given: Any, recorded: Any) -> bool:
    """Whether a plain value is the one that was recorded; an empty dictionary is none."""
    if isinstance(given, Tensor):
        return False
    empty: tuple[Any, ...] = (None, {})
    return bool(given == recorded or (given in empty and recorded in empty))


def _files(path: Path) -> list[Path]:
    """The graph, or those of a folder."""
    if not path.is_dir():
        return [path]
    found = sorted(path.glob("*.onnx"))
    if not found:
        raise ModelError(f"'{path}' has no graphs; give the path of what `ptq-tdq export` has written.")
    return found


def _read(file: Path) -> tuple[onnx.GraphProto, Facts]:
    """The graph and what the file says of itself."""
    try:
        model = onnx.load(file, load_external_data=False)
        said = json.loads({p.key: p.value for p in model.metadata_props}[METADATA])
    except OSError as error:
        reason = error.strerror or error
        raise ModelError(f"'{file}' cannot be read ({reason}); give the path of an ONNX file.") from error
    except Exception as error:  # protobuf's own type of error is private
        raise ModelError(f"'{file}' is not an ONNX file that `ptq-tdq export` has written.") from error
    places = {entry.value for x in model.graph.initializer for entry in x.external_data if entry.key == "location"}
    if not places <= {WEIGHTS}:
        raise ModelError(f"'{file}' asks for the file '{(places - {WEIGHTS}).pop()[:100]}', which we have not written.")
    return model.graph, Facts.of(said, model.graph, file)
