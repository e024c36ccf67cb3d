"""Two artifacts of a report side by side: what differs between them, the bigger differences first."""

from __future__ import annotations

from statistics import median
from typing import Any

import numpy as np

from ptq_tdq.report.findings import average
from ptq_tdq.report.text import signed

Json = dict[str, Any]
POINTS = 257  # of the time axis, on which ranges are compared
FLOAT = "floating point"


def differences(first: Json, second: Json, last: float) -> Json:
    """What the page says of ``second`` beside ``first``, artifacts of one report over t = 0 to ``last``.

    ``choices`` is [(name, first, second)]. ``layers`` have the layers' own SQNR (dB, mean over the steps), ``ranges``
    what the range of each quantizer in the second is of that in the first. What only one of the artifacts quantizes
    comes before the rest.
    """
    return {
        "choices": unequal(first["choices"], second["choices"]),
        "layers": _layers(first, second),
        "ranges": _ranges(first["tables"], second["tables"], last),
    }


def difference(first: float | None, second: float | None) -> float | None:
    """``second`` - ``first``, of numbers that may be unknown."""
    return None if first is None or second is None else second - first


def summary(found: Json) -> list[str]:
    """The differences in sentences."""
    changes = [row["change"] for row in found["layers"] if row["change"] is not None]
    distances = [row["distance"] for row in found["ranges"] if row["distance"] is not None]
    said = []
    if changes:
        worse = sum(change < 0 for change in changes)
        said.append(
            f"{worse} of {len(changes)} layers lose more by themselves (median {signed(median(changes), 'dB')})."
        )
    if distances:
        said.append(f"Ranges of activations differ by {median(distances):.1%} (median of {len(distances)}).")
    return said or ["The artifacts hold nothing that could be compared by numbers."]


def unequal(first: Json, second: Json) -> list[tuple[str, Any, Any]]:
    """Entries that differ: (name, first, second), None where one has none."""
    names = [name for name in {**first, **second} if first.get(name) != second.get(name)]
    return [(name, first.get(name), second.get(name)) for name in names]


def _layers(first: Json, second: Json) -> list[Json]:
    """Layers whose bits or whose errors differ; "change" is None where only one artifact measured or quantizes it."""
    ours, theirs = _by_layer(first), _by_layer(second)
    rows = []
    for name in {**ours, **theirs}:
        (bits, sqnr), (other_bits, other_sqnr) = ours.get(name, (FLOAT, None)), theirs.get(name, (FLOAT, None))
        change = difference(sqnr, other_sqnr)
        if bits != other_bits or change:
            row = {"name": name, "bits": (bits, other_bits), "sqnr_db": (sqnr, other_sqnr), "change": change}
            rows.append(row)
    return _sorted(rows, "change")


def _by_layer(artifact: Json) -> dict[str, tuple[str, float | None]]:
    """Bits and mean SQNR of each layer."""
    layers, tables = artifact["layers"], artifact["tables"]
    own = artifact["errors"]["own"] if artifact["errors"] else [[]] * len(layers)
    return {layer["name"]: (_bits(layer, tables), average(row)) for layer, row in zip(layers, own, strict=True)}


def _bits(layer: Json, tables: Json) -> str:
    inputs = sorted({tables[name]["bits"] for name in layer["quantizers"]})
    return "".join([f"W{layer['weight_bits']}" if layer["weight_bits"] else "", *(f"A{bits}" for bits in inputs)])


def _ranges(first: Json, second: Json, last: float) -> list[Json]:
    """Quantizers of both; "ratio" is (least, greatest) over t, "distance" the mean size of its logarithm as a share."""
    t = np.linspace(0, last, POINTS)
    rows = []
    for name in first.keys() & second.keys():
        ours, theirs = first[name], second[name]
        row: Json = {"name": name, "methods": (ours["method"], theirs["method"]), "ratio": None, "distance": None}
        if "scale" in ours and "scale" in theirs:
            logs = np.log(_width(theirs, t) / _width(ours, t))
            row["ratio"] = float(np.exp(logs.min())), float(np.exp(logs.max()))
            row["distance"] = float(np.expm1(np.abs(logs).mean()))
        if row["distance"] or ours["method"] != theirs["method"]:
            rows.append(row)
    return _sorted(rows, "distance")


def _width(table: Json, t: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    low, high = (np.interp(t, table[key]["t"], table[key]["v"]) for key in ("lo", "hi"))
    return np.asarray(high - low)


def _sorted(rows: list[Json], key: str) -> list[Json]:
    """Greatest first, and before those what has no number."""
    return sorted(rows, key=lambda row: (row[key] is not None, -abs(row[key] or 0), row["name"]))
