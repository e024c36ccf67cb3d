"""A second device on any machine: tensors that compute on the CPU but say they do not, and refuse to meet CPU tensors.

Whoever makes a tensor without saying where, or forgets to move one, gets the error that a GPU gives, and values are
real, so that whole runs work.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

NAME = "elsewhere"
# Indices may be on the CPU, and a number meets any tensor.
MIXING = {"aten::index.Tensor", "aten::index_put_", "aten::index_put", "aten::copy_", "aten::_index_put_impl_"}


class Elsewhere(Tensor):
    """A tensor on the pretended device."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # what is made of it passes __torch_dispatch__

    @staticmethod
    def __new__(cls, held: Tensor) -> Elsewhere:
        made: Elsewhere = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(NAME, 0),
            requires_grad=held.requires_grad,
        )
        made.held = held
        return made

    def __repr__(self, **_: Any) -> str:
        return f"Elsewhere({self.held!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = Elsewhere(self.held.detach().clone())
        result = nn.Parameter(copied, self.requires_grad) if isinstance(self, nn.Parameter) else copied
        memo[id(self)] = result
        return result

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})


def _dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors: list[Tensor] = []
    held = _held(args, tensors), {key: _held(value, tensors) for key, value in kwargs.items()}
    there = any(isinstance(x, Elsewhere) for x in tensors)
    strangers = there and any(x.ndim and not isinstance(x, Elsewhere) for x in tensors)
    if strangers and func._schema.name not in {name.partition(".")[0] for name in MIXING}:
        raise RuntimeError(f"Expected all tensors to be on the same device, but {func} meets both.")
    if strangers and "index" in func._schema.name and not isinstance(tensors[0], Elsewhere):
        raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
    target = kwargs.get("device")
    if target is not None and torch.device(target).type == NAME:
        there, held[1]["device"] = True, torch.device("cpu")
    elif target is not None:
        there = False
    if func is torch.ops.aten.copy_.default:  # keeps the place of what it writes to
        held[0][0].copy_(held[0][1])
        return args[0]
    result = func(*held[0], **held[1])
    if func is torch.ops.aten._to_copy.default and target is not None:
        return Elsewhere(result) if there else result
    return return_and_correct_aliasing(func, args, kwargs, _wrapped(result)) if there else result


def _held(value: Any, tensors: list[Tensor]) -> Any:
    """An argument with what its tensors hold; the tensors go to ``tensors``. A tree of torch's takes far longer."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return value.held if isinstance(value, Elsewhere) else value
    return type(value)(_held(x, tensors) for x in value) if isinstance(value, (list, tuple)) else value


def _wrapped(value: Any) -> Any:
    if isinstance(value, Tensor):
        return Elsewhere(value)
    return type(value)(map(_wrapped, value)) if isinstance(value, (list, tuple)) else value


class _Module(backend_registration._DummyBackendModule):
    """What torch asks of a backend."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Module())


class _Factories(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})


class _FromNumbers(TorchFunctionMode):
    """``torch.tensor`` copies numbers to a device without asking any dispatcher."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or "cpu").type == NAME:
            return func(*args, **{**kwargs, "device": None}).to(kwargs["device"])
        return func(*args, **kwargs)


@contextmanager
def second_device() -> Iterator[torch.device]:
    """While open, tensors can be made on and moved to the pretended device."""
    with _Factories(), _FromNumbers():
        yield torch.device(NAME, 0)


def send(model: nn.Module) -> nn.Module:
    """Move a model there."""
    for module in model.modules():
        for name, value in module._parameters.items():
            if value is not None:
                module._parameters[name] = nn.Parameter(Elsewhere(value.detach()), requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = Elsewhere(buffer)
    return model
