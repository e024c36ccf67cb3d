"""A quantized model as torch traces it: with one opaque node for each quantized layer and quantizer.

``Layer`` (domain ptq_tdq, attribute ``name``) stands for a quantized layer with its input quantizers, ``Quantizer`` for
one operand of an attention product.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager, redirect_stderr
from functools import partial
from io import StringIO
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils import _pytree as pytree

from ptq_tdq.calls.arguments import REFUSALS
from ptq_tdq.errors import ModelError, first_line
from ptq_tdq.export.onnx.geometry import output_shape, unpadded
from ptq_tdq.export.onnx.reads import Answers, Read, listen
from ptq_tdq.export.onnx.reals import InReals, has_complex
from ptq_tdq.export.onnx.rewrite import InOtherWords, without_autocast
from ptq_tdq.export.onnx.signature import Signature
from ptq_tdq.modules import ActivationQuantizer
from ptq_tdq.modules.delegating import Delegating
from ptq_tdq.quantized_model import QuantizedModel
from ptq_tdq.records import QuantizerRecord
from ptq_tdq.timeaxis import at
from ptq_tdq.timed_model import in_float32

DOMAIN = "ptq_tdq"
OPSET = 21
REFUSED = "torch cannot export the model to ONNX ({})."


class ReadsValuesError(ModelError):
    """The model's code depends on values of tensors, which tracing does not have."""


class Call(nn.Module):
    """The model with a dictionary of tensors as its only argument, and all tensors that it returns as its result.

    What it holds (:meth:`hold`) is not in the dictionary. Its code is then told what it reads while it is traced, as a
    run before has found it; where that includes decisions, the last result says whether they are the same.
    """

    def __init__(self, quantized: QuantizedModel, signature: Signature) -> None:
        super().__init__()
        self.model, self.signature, self._marked = quantized.model, signature, partial(_marked, quantized)
        self.holds = False
        self._holding: dict[str, Tensor] = {}
        self._reads: list[Read] | None = None
        self._seen: set[str] = set()

    def hold(self, tensors: dict[str, Tensor], samples: int) -> None:
        """Make ``tensors`` of some ``samples``, possibly none, part of the model."""
        self.signature = self.signature.holding(tensors, samples)
        self._holding, self.holds = tensors, True

    def listen(self, tensors: dict[str, Tensor]) -> list[Read]:
        """What the code reads in one call."""
        with at(torch.zeros(1)):
            return listen(self, tensors)

    def same_in_training(self, modules: Collection[nn.Module], tensors: dict[str, Tensor]) -> bool:
        """Put ``modules`` (without what they hold) into training mode, where that changes no result of a call."""
        before = self._results(tensors)
        for module in modules:
            module.training = True
        try:
            same = all(map(partial(torch.allclose, rtol=1e-3, atol=1e-4), self._results(tensors), before))
        except REFUSALS:
            same = False
        for module in modules:
            module.training = same
        return same

    def _results(self, tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
        with torch.no_grad(), at(torch.zeros(1)):
            return self.forward(tensors)

    def forward(self, tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
        answers = None if self._reads is None else Answers(self._reads, frozenset(self._holding))
        with without_autocast(), InOtherWords(answers, self._seen):
            returned = self.model(**self.signature.fill(tensors | self._holding))
        results = [in_float32(leaf) for leaf in pytree.tree_leaves(returned) if isinstance(leaf, Tensor)]
        if answers is not None and answers.checks:
            results.append(torch.cat(answers.checks).all().reshape(1))
        return tuple(results)

    def export(self, tensors: dict[str, Tensor], free: dict[str, dict[int, str]]) -> torch.export.ExportedProgram:
        """The traced model; the axes ``free`` become constants where the model's own code needs that.

        Raises :class:`ReadsValuesError` for code that depends on what tracing does not have, :class:`ModelError` for
        whatever else torch does not trace.
        """
        shapes = ({name: dict.fromkeys(free.get(name, ()), torch.export.Dim.AUTO) for name in tensors},)
        reads = self.listen(tensors) if self.holds else None
        self._seen.clear()
        with _refusals(() if self.holds else self._seen), self._marked():
            self._reads = reads
            try:
                exported = torch.export.export(self, (tensors,), dynamic_shapes=shapes, strict=False)
            finally:
                self._reads = None
            if has_complex(exported):
                exported = torch.export.export(InReals(exported), (tensors,), dynamic_shapes=shapes, strict=False)
            return exported


class _Layer(Delegating):
    _inside = "layer"

    def __init__(self, layer: nn.Module, name: str) -> None:
        super().__init__()
        self.layer, self.name = layer, name
        self.plain, self.pad = unpadded(layer)

    def forward(self, input: Tensor) -> Tensor:  # torch's layers are called by this name too
        x = self.pad(input)
        shape = output_shape(self.plain, x)
        return torch.onnx.ops.symbolic(
            f"{DOMAIN}::Layer", [x], attrs={"name": self.name}, dtype=x.dtype, shape=shape, version=1
        )


class _Quantizer(ActivationQuantizer):
    def __init__(self, record: QuantizerRecord) -> None:
        super().__init__(record)
        self.enabled = True

    def forward(self, x: Tensor, *interval: Tensor) -> Tensor:
        return torch.onnx.ops.symbolic(
            f"{DOMAIN}::Quantizer", [x], attrs={"name": self.record.name}, dtype=x.dtype, shape=x.shape, version=1
        )


def convert(exported: torch.export.ExportedProgram) -> Any:
    """The traced model as an ONNX program."""
    with _refusals():
        return torch.onnx.export(exported, dynamo=True, opset_version=OPSET, verbose=False)


@contextmanager
def _refusals(reads: Collection[str] = ()) -> Iterator[None]:
    """One sentence for whatever torch, or the model's own code, says while it is traced.

    ``reads`` are the ways in which the code has read values of tensors by then.
    """
    try:
        with quiet(), torch.no_grad():
            yield
    except ModelError as error:
        raise ModelError(first_line(error)) from error  # torch adds what it was doing
    except Exception as error:  # of many unrelated types
        reason = _reason(error)
        if reads or _depends_on_values(error):
            read = f" ({', '.join(sorted(reads))})" if reads else ""
            reason = f"its code depends on values of tensors{read}, and a graph is one code for all"
            raise ReadsValuesError(REFUSED.format(reason)) from error
        raise ModelError(REFUSED.format(reason)) from error


def _reason(error: BaseException) -> str:
    """The first line of the innermost cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)


def _depends_on_values(error: BaseException) -> bool:
    """Whether tracing has met a size or a choice that only the values of a tensor tell."""
    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    unknown = ("non-nested SymInt", "should have been constant")  # a size where the code needs a number
    return any(isinstance(e, GuardOnDataDependentSymNode) or any(u in str(e) for u in unknown) for e in causes)


@contextmanager
def _marked(quantized: QuantizedModel) -> Iterator[None]:
    """Opaque modules in the place of quantized layers and of the quantizers of attention products."""
    before: list[tuple[nn.Module, str, nn.Module]] = []

    def put(parent: nn.Module, name: str, marker: nn.Module) -> None:
        before.append((parent, name, getattr(parent, name)))
        setattr(parent, name, marker)

    try:
        for name, layer in quantized.layers().items():
            parent, _, own = name.rpartition(".")
            put(quantized.model.get_submodule(parent), own, _Layer(layer.layer, name))
        for module in list(quantized.model.modules()):
            for key, child in list(module.named_children()):
                if type(child) is ActivationQuantizer:
                    put(module, key, _Quantizer(child.record))
        yield
    finally:
        for place in before:
            setattr(*place)


@contextmanager
def quiet() -> Iterator[None]:
    """Hold back what the exporter says about missing packages and its own future, and the graphs it did not finish."""
    talkers = ("torch.onnx", "onnx_ir", "onnxscript", "torch.fx.experimental.symbolic_shapes")
    levels = {logger: logger.level for logger in map(logging.getLogger, talkers)}
    for logger in levels:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
