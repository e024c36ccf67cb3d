"""What this machine computes: on which devices, integer products, bfloat16."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from threading import Lock
from typing import Literal

import torch
from torch import Tensor

from ptq_tdq.errors import ConfigError, ModelError, first_line

ComputeDtype = Literal["auto", "float32", "bfloat16"]
COMPUTE_DTYPES = {
    "auto": "bfloat16 where the processor computes in it, float32 elsewhere",
    "float32": "exact",
    "bfloat16": "fast where the processor has it",
}


def check_device(device: str | torch.device) -> None:
    """Raise :class:`ConfigError` for a device that is not there."""
    try:
        torch.zeros(1, device=device).cpu()  # also what has no values, as "meta"
    except (RuntimeError, AssertionError, ValueError) as error:  # an assertion where torch is built without it
        said = first_line(error)
        raise ConfigError(f"The device {str(device)!r} cannot be used here ({said}); choose another.") from error


def instruction_set() -> str:
    """The instructions for integer products: "amx-int8", "vnni" or, without these, the widest vectors ("avx2")."""
    if torch.cpu._is_amx_tile_supported():
        return "amx-int8"
    return "vnni" if torch.cpu._is_vnni_supported() else torch.backends.cpu.get_cpu_capability().lower()


def sums_eight_bits() -> bool:
    """Whether u8 x s8 products are added in 32 bits; other processors add pairs in 16 bits first, and saturate."""
    return instruction_set() in ("amx-int8", "vnni")


def has_bfloat16() -> bool:
    """Whether bfloat16 products are instructions; elsewhere they are emulated, ten times slower than float32."""
    return bool(torch.cpu._is_avx512_bf16_supported())


def compute_dtype(choice: ComputeDtype) -> ComputeDtype:
    """The dtype that a choice of one means here: "auto" is bfloat16 where the processor computes in it."""
    if choice != "auto":
        return choice
    return "bfloat16" if has_bfloat16() else "float32"


@contextmanager
def products_in(dtype: torch.dtype, weights: Iterable[Tensor], device: torch.device) -> Iterator[None]:
    """A ``with`` block whose products are in ``dtype``; a model whose weights are in half precision keeps its own.

    Raises :class:`ModelError` for an operation that torch leaves in the dtypes that it meets, and these differ.
    """
    lower = dtype != torch.float32 and {weight.dtype for weight in weights} == {torch.float32}
    try:
        # without the cache: it would keep the first low-precision copy of a parameter while the parameter learns
        with torch.autocast(device.type, dtype, enabled=lower, cache_enabled=False):
            yield
    except RuntimeError as error:
        if not lower or not any(word in str(error) for word in ("dtype", "scalar type", "data type")):
            raise
        raise ModelError(
            f"An operation of the model does not compute in {dtype} ({first_line(error)}); choose float32 as "
            "compute_dtype."
        ) from error


class _Float32Default:
    """A ``with`` block in which new tensors are float32, whatever torch's default dtype, which all threads share."""

    def __init__(self) -> None:
        self._lock, self._users, self._before = Lock(), 0, torch.float32

    def __enter__(self) -> None:
        with self._lock:
            if not self._users:
                self._before = torch.get_default_dtype()
                torch.set_default_dtype(torch.float32)
            self._users += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._users -= 1
            if not self._users:
                torch.set_default_dtype(self._before)


FLOAT32_DEFAULT = _Float32Default()


@contextmanager
def undisturbed() -> Iterator[None]:
    """A ``with`` block, or decorator, for whole runs, which computes the same whatever torch is set to around it.

    No inference mode, no autocast and float32 as the default dtype; and no warning of norms whose weight has not the
    dtype of their input, as is so behind :func:`products_in`.
    """
    accelerator = torch.accelerator.current_accelerator()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        for kind in {"cpu", "cpu" if accelerator is None else accelerator.type}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(FLOAT32_DEFAULT)
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")
        yield
