"""The file of a calibration set: safetensors, with the trees of the arguments and a hash of everything in its header.

A tree in JSON: ``{"dict": {...}}``, ``{"list": [...]}``, ``{"tuple": [...]}``, ``{"named": {...}, "class": name}`` (a
tuple whose items have names), ``{"each": [tensor, ...]}``, ``{"rows": tensor, "dim": where, "several": bool}``,
``{"tensor": tensor}``, or ``{"value": plain}``; tensors are named.
"""

from __future__ import annotations

import hashlib
import json
from collections import namedtuple
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ptq_tdq.calls.arguments import Each, Group, Place, check_argument
from ptq_tdq.errors import CalibrationSetError
from ptq_tdq.files import check_tensors, reason

FOREIGN = "The file '{}' is no calibration set of ptq-tdq, or its header was altered; record it again."
MAPPED = 1 << 30  # bytes of a file above which it is mapped into memory
_METADATA_KEY = "ptq_tdq_calls"  # one key: safetensors writes several in random order


def digest(header: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """Hash of every tensor (name, type, shape, bytes) and of the header."""
    found = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def encode(header: dict[str, Any], tensors: dict[str, Tensor]) -> bytes:
    """The file's bytes; equal sets give equal bytes."""
    metadata = json.dumps({**header, "sha256": digest(header, tensors)})  # in the order of the arguments
    data: bytes = save(tensors, metadata={_METADATA_KEY: metadata})
    return data


def read(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of a file, verified; raises :class:`CalibrationSetError`.

    The tensors of a large file stay in it, and the system reads what is used.
    """
    try:
        check_tensors(Path(path))
        with safe_open(path, framework="pt") as opened:
            header = json.loads((opened.metadata() or {})[_METADATA_KEY])
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
            if Path(path).stat().st_size <= MAPPED:
                tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        intact = header.pop("sha256") == digest(header, tensors)
    except FileNotFoundError as error:
        raise CalibrationSetError(f"There is no calibration set at '{path}'; check the path.") from error
    except (OSError, SafetensorError) as error:
        raise CalibrationSetError(
            f"The calibration set '{path}' is truncated or is no safetensors file; record it again ({reason(error)})."
        ) from error
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, RecursionError) as error:
        raise CalibrationSetError(FOREIGN.format(path)) from error
    except MemoryError as error:
        raise CalibrationSetError(
            f"The calibration set '{path}' needs more memory than there is; free some, or record fewer calls."
        ) from error
    if not intact:
        raise CalibrationSetError(
            f"The calibration set '{path}' was altered: its content does not match its hash; record it again."
        )
    return header, tensors


def pack(number: int, group: Group, tensors: dict[str, Tensor]) -> Any:
    """The tree of a group as JSON; its tensors are added to ``tensors``."""

    def walk(value: Any) -> Any:
        if isinstance(value, dict):
            return {"dict": {key: walk(item) for key, item in value.items()}}
        if hasattr(value, "_fields"):
            return {"named": dict(zip(value._fields, map(walk, value), strict=True)), "class": type(value).__name__}
        if isinstance(value, list | tuple):
            return {"list" if isinstance(value, list) else "tuple": [walk(item) for item in value]}
        if isinstance(value, Place):
            return _pack_rows(f"{number}.{value.index}", value, group.rows[value.index], tensors)
        if isinstance(value, Tensor):
            name = f"{number}.shared.{len(tensors)}"
            tensors[name] = value
            return {"tensor": name}
        check_argument(value)
        return {"value": value}

    return walk(group.tree)


def _pack_rows(name: str, place: Place, rows: Tensor | Each, tensors: dict[str, Tensor]) -> Any:
    if isinstance(rows, Tensor):
        tensors[name] = rows
        return {"rows": name, "dim": place.dim, "several": place.several}
    names = [f"{name}.{i}" for i in range(len(rows))]
    tensors.update(zip(names, rows.items, strict=True))
    return {"each": names}


@cache
def _named(name: str, fields: tuple[str, ...]) -> Any:
    """A class of tuples like one that code outside has; one for all groups, so that their trees are alike."""
    return namedtuple(name, fields)


def unpack(packed: Any, tensors: dict[str, Tensor]) -> Group:
    """Inverse of :func:`pack`; raises KeyError, TypeError or ValueError for what it has not written."""
    rows: list[Tensor | Each] = []

    def place(value: Tensor | Each, dim: int = 0, several: bool = False) -> Place:
        rows.append(value)
        return Place(len(rows) - 1, dim, several)

    def walk(value: dict[str, Any]) -> Any:
        if "rows" in value:
            name, dim, several = value["rows"], value["dim"], value["several"]
            if len(value) != 3 or type(dim) is not int or type(several) is not bool or dim < 0:
                raise ValueError
            return place(tensors[name], dim, several)
        if "named" in value:
            kind = _named(value["class"], tuple(value["named"]))
            return kind(*map(walk, value["named"].values()))
        ((kind, content),) = value.items()
        if kind == "dict":
            return {key: walk(item) for key, item in content.items()}
        if kind in ("list", "tuple"):
            items = [walk(item) for item in content]
            return items if kind == "list" else tuple(items)
        if kind == "each":
            return place(Each(tuple(tensors[name] for name in content)))
        return tensors[content] if kind == "tensor" else content

    return Group(walk(packed), rows)
