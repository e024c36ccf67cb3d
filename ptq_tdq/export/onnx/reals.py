"""Complex numbers as pairs of real ones: rotary embeddings multiply by them, and no runtime of ONNX has any."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ptq_tdq.errors import ModelError

# What these do to a complex tensor, they do to its parts, each by itself.
_BY_PART = (
    *("alias", "cat", "chunk", "clone", "contiguous", "copy_", "detach", "detach_", "expand", "flatten", "flip"),
    *("gather", "getitem", "index", "index_select", "lift_fresh_copy", "movedim", "narrow", "pad", "pad_sequence"),
    *("permute", "repeat", "reshape", "select", "slice", "split", "split_with_sizes", "squeeze", "stack", "to"),
    *("transpose", "unbind", "unflatten", "unsqueeze", "view"),
)
_ZEROS = ("new_zeros", "zeros", "zeros_like")
_REAL = {torch.complex32: torch.float16, torch.complex64: torch.float32, torch.complex128: torch.float64}


@dataclass(frozen=True)
class Pair:
    """A complex tensor of the shape of both parts."""

    real: Tensor
    imag: Tensor

    @classmethod
    def polar(cls, absolute: Tensor, angle: Tensor) -> Pair:
        """|z| (cos angle + i sin angle)."""
        return cls(absolute * angle.cos(), absolute * angle.sin())

    @classmethod
    def of_last_axis(cls, x: Tensor) -> Pair:
        """[..., 2] -> [...]."""
        return cls(*x.unbind(-1))

    def last_axis(self) -> Tensor:
        """[...] -> [..., 2]."""
        return torch.stack([self.real, self.imag], -1)

    def times(self, other: Any) -> Pair:
        """The product with a complex or a real factor."""
        if not isinstance(other, Pair):
            return Pair(self.real * other, self.imag * other)
        real = self.real * other.real - self.imag * other.imag
        return Pair(real, self.real * other.imag + self.imag * other.real)


_MAKERS: dict[str, Callable[..., Pair]] = {"polar": Pair.polar, "complex": Pair, "view_as_complex": Pair.of_last_axis}


class InReals(nn.Module):
    """A traced program as a module that computes the same without complex numbers.

    Its forward raises :class:`ModelError` for what is done to complex numbers beside products and changes of shape.
    """

    def __init__(self, exported: torch.export.ExportedProgram) -> None:
        super().__init__()
        traced = exported.module(check_guards=False)
        assert isinstance(traced, fx.GraphModule)
        self.traced, self._constants = traced, dict[str, Pair]()
        for name in {str(node.target) for node in traced.graph.nodes if node.op == "get_attr"}:
            parent, _, own = name.rpartition(".")
            value = getattr(traced.get_submodule(parent), own)
            if isinstance(value, Tensor) and value.is_complex():
                self._constants[name] = Pair(value.real.contiguous(), value.imag.contiguous())

    def forward(self, tensors: dict[str, Tensor]) -> Any:
        return _Interpreter(self.traced, self._constants).run(tensors)


def has_complex(exported: torch.export.ExportedProgram) -> bool:
    """Whether a traced program computes with complex numbers."""
    values = pytree.tree_leaves([node.meta.get("val") for node in exported.graph.nodes])
    return any(isinstance(value, Tensor) and value.is_complex() for value in values)


class _Interpreter(fx.Interpreter):
    def __init__(self, traced: fx.GraphModule, constants: dict[str, Pair]) -> None:
        super().__init__(traced)
        self._constants = constants

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self._constants.get(str(target)) or super().get_attr(target, args, kwargs)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        name = getattr(target, "overloadpacket", target).__name__
        leaves, spec = pytree.tree_flatten((args, kwargs))
        pairs = [leaf for leaf in leaves if isinstance(leaf, Pair)]
        if name in _MAKERS:
            return _MAKERS[name](*args)
        if pairs and name == "wrap_with_autocast":
            *setting, traced = args[:5]
            with torch.autocast(*setting):
                return _Interpreter(traced, {}).run(*args[5:])
        if not pairs and not (name in _ZEROS and any(isinstance(x, torch.dtype) and x in _REAL for x in leaves)):
            return super().call_function(target, args, kwargs)
        if name in ("sym_size", "_assert_tensor_metadata"):
            return super().call_function(target, (pairs[0].real, *args[1:]), {})
        if name == "view_as_real":
            return pairs[0].last_axis()
        if name in ("real", "imag"):
            return getattr(pairs[0], name)
        if name == "mul":
            return pairs[0].times(args[1] if args[0] is pairs[0] else args[0])
        fill = any(isinstance(leaf, float) and leaf != 0 for leaf in leaves)
        if name not in (*_BY_PART, *_ZEROS) or fill:
            raise ModelError(f"The model computes with complex numbers ({name}), which ONNX does not have.")
        parts = []
        for part in ("real", "imag"):
            own = [getattr(leaf, part) if isinstance(leaf, Pair) else _REAL.get(leaf, leaf) for leaf in leaves]
            arguments = pytree.tree_unflatten(own, spec)
            parts.append(super().call_function(target, *arguments))
        return pytree.tree_map(Pair, *parts)
