"""What torch is set to while something runs: autocast, inference mode and the default dtype."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from threading import Lock

import torch
from torch import Tensor

from ptq_tdq.errors import ModelError, first_line


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
