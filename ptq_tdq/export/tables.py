"""Interval tables for other programs: CSV, JSON and NPZ with the same columns."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from ptq_tdq.atomic import write_atomic
from ptq_tdq.errors import UsageError
from ptq_tdq.load import Given, as_artifact
from ptq_tdq.scheme import QType

COLUMNS = ("layer", "t", "scale", "zero_point", "qmin", "qmax", "lo", "hi")


def interval_frame(artifact: Given) -> pd.DataFrame:
    """One row per quantizer and t, in execution order; ``layer`` is the quantizer's name.

    ``artifact`` is a folder, a hub id, what :func:`~ptq_tdq.calibrate` gave, or an artifact in memory.
    ``scale``, ``lo`` = scale * (qmin - zero_point) and ``hi`` = scale * (qmax - zero_point) are float32, the others
    int32. Raises :class:`UsageError` for dynamic quantizers, which have no table.
    """
    columns: dict[str, list[np.ndarray]] = {name: [] for name in COLUMNS}
    found = as_artifact(artifact)
    for quantizer in found.quantizers:
        table, qtype = found.tables[quantizer.name], QType(quantizer.bits)
        if table.scale is None:
            raise UsageError(
                f"The quantizer '{quantizer.name}' is dynamic: its scale is found at run time and it has no table; "
                "choose an artifact with another method."
            )
        steps = len(table.scale)
        rows = {
            "t": torch.arange(steps, dtype=torch.int32),
            "scale": table.scale,
            "zero_point": table.zero_point,
            "qmin": torch.full((steps,), qtype.qmin, dtype=torch.int32),
            "qmax": torch.full((steps,), qtype.qmax, dtype=torch.int32),
            "lo": table.scale * (qtype.qmin - table.zero_point),
            "hi": table.scale * (qtype.qmax - table.zero_point),
        }
        columns["layer"].append(np.full(steps, quantizer.name, dtype=object))
        for name, values in rows.items():
            columns[name].append(values.numpy())
    return pd.DataFrame({name: np.concatenate(parts) if parts else [] for name, parts in columns.items()})


def export_tables(artifact: Given, file: str | Path, format: str) -> None:
    """Write :func:`interval_frame` to ``file`` as "csv", "json" (an object of columns) or "npz" (an array per column).
    A file that is there is replaced.

    Decimals are the shortest that give the float32 back exactly; the same tables give the same bytes. Raises
    :class:`UsageError` for another format or dynamic quantizers, :class:`OutputError` when the file cannot be written.
    """
    if format not in _ENCODERS:
        raise UsageError(
            f"The format of interval tables must be one of {', '.join(_ENCODERS)}. Got {format!r} instead."
        )
    write_atomic(file, _ENCODERS[format](interval_frame(artifact)))


def _csv(frame: pd.DataFrame) -> bytes:
    text: str = frame.to_csv(index=False, lineterminator="\n")
    return text.encode("utf-8")


def _json(frame: pd.DataFrame) -> bytes:
    # float(str(x)): the shortest decimal of the float32 x, which json would otherwise print with a float64's digits.
    columns = {
        name: [float(str(x)) for x in values] if values.dtype == np.float32 else values.tolist()
        for name, values in ((name, frame[name].to_numpy()) for name in COLUMNS)
    }
    lines = (f"{json.dumps(name)}: {json.dumps(values, allow_nan=False)}" for name, values in columns.items())
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode("utf-8")


def _npz(frame: pd.DataFrame) -> bytes:
    buffer = io.BytesIO()
    arrays = {name: frame[name].to_numpy() for name in COLUMNS}
    # Plain text instead of Python objects, which only pickle could read. NumPy dates every member 1980-01-01.
    np.savez_compressed(buffer, **{**arrays, "layer": arrays["layer"].astype(np.str_)})
    return buffer.getvalue()


_ENCODERS: dict[str, Callable[[pd.DataFrame], bytes]] = {"csv": _csv, "json": _json, "npz": _npz}
