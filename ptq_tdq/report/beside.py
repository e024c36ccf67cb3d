"""Two artifacts side by side, as the page writes it."""

from __future__ import annotations

import math
from typing import Any

from ptq_tdq.files import size_text
from ptq_tdq.report.differences import difference, differences, summary, unequal
from ptq_tdq.report.text import (
    UNKNOWN,
    calibration_rows,
    choice_text,
    decibels,
    latents_db,
    prediction_db,
    signed,
)

Json = dict[str, Any]
Row = tuple[str, list[str], str, tuple[float, ...]]  # name, cells, change, ends of a bar
FIRST = 12  # rows of a table that are not folded


def beside(data: Json, first: Json, second: Json) -> Json:
    """What the page shows of ``second`` beside ``first``, two artifacts of a report's numbers."""
    found = differences(first, second, data["num_train_timesteps"])
    names = first["name"], second["name"]
    made = unequal(*(_calibration(artifact) for artifact in (first, second)))
    layers: list[Row] = [
        (
            row["name"],
            [_arrow(row["bits"]), *map(decibels, row["sqnr_db"])],
            signed(row["change"], "dB"),
            (row["change"] or 0,),
        )
        for row in found["layers"]
    ]
    ranges: list[Row] = [
        (row["name"], [_arrow(row["methods"])], _ratio(row["ratio"]), tuple(map(math.log, row["ratio"] or (1,))))
        for row in found["ranges"]
    ]
    tables = [
        _table(
            "Layers",
            "SQNR of each layer by itself, mean over the steps. Bars to the left: loses more.",
            ("layer", "bits", *names, "difference"),
            layers,
        ),
        _table(
            "Ranges of activations",
            f"What {names[1]} covers by what {names[0]} covers: least and greatest over t, by mean distance from 1.",
            ("activation", "method", "ratio"),
            ranges,
        ),
    ]
    return {
        "first": names[0],
        "second": names[1],
        "summary": " ".join(summary(found)),
        "results": _results(data, first, second),
        "choices": [(name, *map(choice_text, pair)) for name, *pair in (*found["choices"], *made)],
        "tables": [table for table in tables if table["rows"]],
    }


def _results(data: Json, first: Json, second: Json) -> list[tuple[str, str, str, str]]:
    """What was measured: name, first, second, difference."""
    measured = {
        f"final {data['end']}": [latents_db(artifact) for artifact in (first, second)],
        "prediction": [prediction_db(artifact) for artifact in (first, second)],
        "images (PSNR)": [artifact["image_psnr_db"] for artifact in (first, second)],
    }
    rows = [
        (name, decibels(a), decibels(b), signed(difference(a, b), "dB"))
        for name, (a, b) in measured.items()
        if (a, b) != (None, None)
    ]
    share = 100 * (second["bytes"] / first["bytes"] - 1)
    return [*rows, ("size", size_text(first["bytes"]), size_text(second["bytes"]), signed(share, "%", 0))]


def _calibration(artifact: Json) -> dict[str, str]:
    """What the calibration set was made with beyond the choices."""
    left_out = {"sha256", *artifact["choices"]}
    return {name: text for name, text in calibration_rows(artifact["calibration_set"]) if name not in left_out}


def _table(title: str, text: str, head: tuple[str, ...], rows: list[Row]) -> Json:
    """Rows, their bars drawn about the middle of one axis."""
    most = max((abs(end) for *_, ends in rows for end in ends), default=0.0) or 1.0
    drawn = [
        {
            "name": name,
            "cells": cells,
            "change": change,
            "left": f"{50 + 50 * min(0, *ends) / most:.2f}",
            "width": f"{50 * (max(0, *ends) - min(0, *ends)) / most:.2f}",
        }
        for name, cells, change, ends in rows
    ]
    return {"title": title, "text": text, "head": head, "rows": drawn[:FIRST], "rest": drawn[FIRST:]}


def _arrow(pair: tuple[str, str]) -> str:
    return pair[0] if pair[0] == pair[1] else f"{pair[0]} \N{RIGHTWARDS ARROW} {pair[1]}"


def _ratio(pair: tuple[float, float] | None) -> str:
    if pair is None:
        return UNKNOWN
    low, high = (f"{ratio:.2f}" for ratio in pair)
    return f"{low}\N{MULTIPLICATION SIGN}" if low == high else f"{low} to {high}\N{MULTIPLICATION SIGN}"
