"""Several processes that do one job, as ``torchrun`` or ``accelerate launch`` start them, and end with the same result.

They meet wherever one needs what others have; what one of them raises on purpose, all raise when they meet next, and
where it raises anything else, others raise :class:`WorkerError`. A process alone is the first of one: it gets back what
it gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed
from torch.utils import _pytree as pytree

from ptq_tdq.errors import ConfigError, PtqTdqError, WorkerError, first_line
from ptq_tdq.launch import launched, place

PATIENCE = timedelta(hours=12)  # the first process may collect calls while others wait

T = TypeVar("T")
_apart = ContextVar("_apart", default=False)


@contextmanager
def joined(device: str) -> Iterator[str]:
    """Around the work of all processes of a launch; gives the device of this one."""
    if launched() > 1 and not distributed.is_initialized():
        on_gpu = device.partition(":")[0] == "cuda"
        if on_gpu:
            device = f"cuda:{place()}"
            torch.cuda.set_device(device)
        distributed.init_process_group("nccl" if on_gpu else "gloo", timeout=PATIENCE)
    try:
        with together():
            yield device
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


@contextmanager
def together() -> Iterator[None]:
    """Around what all processes do: they leave it together, and what one of them raises on purpose, all raise.

    Raises :class:`WorkerError` where another process is gone, or has raised anything else.
    """
    try:
        yield
        _meet()
    except Exception as error:
        if not getattr(error, "reported", False):
            with suppress(WorkerError):  # others are gone, and this one's own error says more
                _meet(error)
        raise


def rank() -> int:
    """The number of this process, from 0."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def count() -> int:
    """How many processes there are."""
    return distributed.get_world_size() if distributed.is_initialized() and not _apart.get() else 1


@contextmanager
def apart() -> Iterator[None]:
    """Around what a process does by itself, whatever others do: it is alone."""
    token = _apart.set(True)
    try:
        yield
    finally:
        _apart.reset(token)


def share(number: int, whole: int = 1) -> slice:
    """Which of so many things fall to this process: some in a row, from the multiple of ``whole`` next to its share."""
    edges = [*((number * i // count() + whole // 2) // whole * whole for i in range(count())), number]
    return slice(edges[rank()], edges[rank() + 1])


def gather(items: list[T]) -> list[T]:
    """The items of all processes, in their order; tensors of several processes are on the CPU."""
    if count() == 1:
        return items
    _meet()
    found: list[Any] = [None] * count()
    with _others():
        distributed.all_gather_object(found, pytree.tree_map_only(Tensor, Tensor.cpu, items))
    return [item for some in found for item in some]


def check_alike(given: Callable[[], dict[str, Any]]) -> None:
    """Raise :class:`ConfigError` naming the first key for which processes were not ``given`` the same."""
    if count() == 1:
        return
    found = gather([given()])
    for key, value in found[0].items():
        if any(other[key] != value for other in found):
            raise ConfigError(f"The processes of this run differ in their {key}; give the same to all of them.")


def join_rows(rows: Tensor) -> Tensor:
    """The rows of all processes, in their order."""
    return torch.cat(gather([rows])).to(rows.device) if count() > 1 else rows


def greatest(values: Tensor) -> Tensor:
    """The greatest of all processes' values, element by element."""
    return torch.stack(gather([values])).amax(0).to(values.device)


def total(values: Tensor) -> Tensor:
    """The sum of all processes' values, added in their order."""
    if count() == 1:
        return values
    result = torch.zeros_like(values, device=_place())
    _meet()
    for source in range(count()):
        part = torch.empty_like(result)
        if source == rank():
            part.copy_(values)
        with _others():
            distributed.broadcast(part, source)
        result += part
    return result.to(values.device)


def add_gradients(parameters: Sequence[Tensor]) -> None:
    """Make each gradient the sum of all processes' ones; it is None where it is None in all of them."""
    if count() == 1:
        return
    known = torch.tensor([float(p.grad is not None) for p in parameters], device=_place())
    gradients = [(torch.zeros_like(p) if p.grad is None else p.grad).flatten().to(_place()) for p in parameters]
    flat = torch.cat([known, *gradients])
    _meet()
    with _others():
        distributed.all_reduce(flat)
    known, *sums = flat.split([len(parameters), *(p.numel() for p in parameters)])
    for parameter, found, gradient in zip(parameters, known.tolist(), sums, strict=True):
        parameter.grad = gradient.view_as(parameter).to(parameter) if found else None


def begin_alike(tensors: Iterable[Tensor]) -> None:
    """Give all processes the first one's values."""
    for tensor in tensors if count() > 1 else ():
        tensor.copy_(of_first(tensor.clone))


def of_first(make: Callable[[], T]) -> T:
    """What ``make`` gives in the first process, which alone calls it; tensors of several processes are on the CPU."""
    made: list[T] = []
    if rank() == 0:
        with apart():
            made = [make()]
    return gather(made)[0]


def follow(generator: torch.Generator) -> None:
    """Put a generator into the state of the first process's one."""
    generator.set_state(of_first(generator.get_state))


@contextmanager
def first_alone() -> Iterator[None]:
    """The first process runs the body before all others: it makes the files that they then read."""
    if rank() > 0:
        _meet()
    yield
    if rank() == 0:
        _meet()


def _meet(error: Exception | None = None) -> None:
    """Wait for all processes; those that bring no error raise that of another."""
    if count() == 1:
        return
    if error is not None:
        vars(error)["reported"] = True
    brought = error if isinstance(error, PtqTdqError | None) else _lost(f"failed ({first_line(error)})")
    failed = torch.tensor([int(error is not None)], device=_place())
    with _others():
        distributed.all_reduce(failed)
        if not failed:
            return
        found: list[PtqTdqError | None] = [None] * count()
        distributed.all_gather_object(found, brought)
    first = next(other for other in found if other is not None)
    first.reported = True
    if error is None:
        raise first


def _place() -> torch.device:
    """Where tensors are when processes exchange them."""
    on_gpu = distributed.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


@contextmanager
def _others() -> Iterator[None]:
    """Around what fails where another process is gone."""
    try:
        yield
    except RuntimeError as error:
        raise _lost("ended too early") from error


def _lost(how: str) -> WorkerError:
    """What is raised where another process cannot go on."""
    error = WorkerError(f"Another process of the run has {how}; start the run again, and it goes on.")
    error.reported = True
    return error
