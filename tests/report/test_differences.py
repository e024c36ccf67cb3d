"""Two artifacts side by side: what is said to differ does, and the biggest differences come first."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest

from ptq_tdq.quantized_model import QuantizedModel
from ptq_tdq.report.beside import FIRST, beside
from ptq_tdq.report.data import report_data
from ptq_tdq.report.differences import FLOAT, differences
from ptq_tdq.report.survey import Subject, Survey

Json = dict[str, Any]
LAST = 1000


@pytest.fixture
def data(quantized: QuantizedModel) -> Json:
    """The numbers of a report of one artifact twice, with invented errors."""
    artifact = quantized.to_artifact()
    made = report_data(Survey(tuple(Subject(name, Path(name), artifact) for name in ("a", "b"))))
    for shown in made["artifacts"]:
        count = len(shown["layers"])
        shown["errors"] = {"own": [[20.0 + i, None, 22.0 + i] for i in range(count)], "prediction": [30.0, 31.0, 32.0]}
    return made


def pair_of(data: Json) -> tuple[Json, Json]:
    first, second = data["artifacts"]
    return first, copy.deepcopy(second)


def test_an_artifact_does_not_differ_from_itself(data: Json) -> None:
    assert differences(*pair_of(data), LAST) == {"choices": [], "layers": [], "ranges": []}
    shown = beside(data, *data["artifacts"])
    assert shown["tables"] == [] and shown["choices"] == []
    assert [row[-1] for row in shown["results"]] == ["+0.0 dB", "+0 %"]


def test_choices_that_differ_are_named_with_both_values(data: Json, quantized: QuantizedModel) -> None:
    first, second = pair_of(data)
    second["choices"] |= {"seed": 7, "skip": ["conv_in"]}
    second["calibration_set"] = {**second["calibration_set"], "rows": 10**6}
    assert dict((name, pair) for name, *pair in differences(first, second, LAST)["choices"]) == {
        "seed": [first["choices"]["seed"], 7],
        "skip": [[], ["conv_in"]],
    }
    shown = beside(data, first, second)["choices"]
    assert ("skip", "none", "conv_in") in shown
    assert ("rows", str(first["calibration_set"]["rows"]), "1000000") in shown


def test_layers_come_by_the_size_of_their_change_and_before_them_what_only_one_quantizes(data: Json) -> None:
    first, second = pair_of(data)
    names = [layer["name"] for layer in first["layers"]]
    changes = {names[1]: -0.5, names[2]: 3.0, names[3]: -4.0}
    for name, change in changes.items():
        row = second["errors"]["own"][names.index(name)]
        row[:] = [value and value + change for value in row]
    del second["layers"][0], second["errors"]["own"][0]
    found = differences(first, second, LAST)["layers"]
    assert [row["name"] for row in found] == [names[0], names[3], names[2], names[1]]
    assert found[0]["bits"][1] == FLOAT and found[0]["change"] is None
    assert {row["name"]: row["change"] for row in found[1:]} == pytest.approx(changes)
    assert found[3]["sqnr_db"] == pytest.approx((22.0, 21.5))


@pytest.mark.parametrize("ratio", [0.5, 1.25])
def test_a_range_that_is_scaled_is_found_with_its_ratio(ratio: float, data: Json) -> None:
    first, second = pair_of(data)
    name = next(name for name, table in second["tables"].items() if "scale" in table)
    for key in ("lo", "hi"):
        second["tables"][name][key]["v"] = [ratio * value for value in second["tables"][name][key]["v"]]
    (row,) = differences(first, second, LAST)["ranges"]
    assert row["name"] == name and row["ratio"] == pytest.approx((ratio, ratio))
    assert row["distance"] == pytest.approx(max(ratio, 1 / ratio) - 1)
    (table,) = beside(data, first, second)["tables"]
    (shown,) = table["rows"]
    assert float(shown["width"]) == 50 and float(shown["left"]) == (0 if ratio < 1 else 50)


def test_of_a_range_that_moves_the_least_and_the_greatest_ratio_over_t_are_given(data: Json) -> None:
    first, second = pair_of(data)
    name = next(name for name, table in second["tables"].items() if "scale" in table)
    first["tables"][name] |= {key: {"t": [0, LAST], "v": [end, end]} for key, end in (("lo", -1.0), ("hi", 1.0))}
    second["tables"][name] |= {"lo": {"t": [0, LAST], "v": [-1.0, -3.0]}, "hi": {"t": [0, LAST], "v": [1.0, 3.0]}}
    (row,) = (row for row in differences(first, second, LAST)["ranges"] if row["name"] == name)
    assert row["ratio"] == pytest.approx((1, 3))  # the width grows in a line from 2 to 6
    mean = (3 * math.log(3) - 2) / 2  # of log(1 + 2 u) over u from 0 to 1
    assert row["distance"] == pytest.approx(math.expm1(mean), rel=1e-3)


def test_an_interval_found_at_run_time_has_no_ratio(data: Json) -> None:
    first, second = pair_of(data)
    name = next(name for name, table in second["tables"].items() if "scale" in table)
    second["tables"][name] = {"bits": 8, "method": "dynamic"}
    (row,) = differences(first, second, LAST)["ranges"]
    assert row["ratio"] is None and row["methods"][1] == "dynamic"


def test_small_differences_are_folded(data: Json) -> None:
    first, second = pair_of(data)
    for i, row in enumerate(second["errors"]["own"], 1):
        row[0] -= i
    (table,) = beside(data, first, second)["tables"]
    assert len(table["rows"]) == min(FIRST, len(first["layers"]))
    assert len(table["rows"]) + len(table["rest"]) == len(first["layers"])


def test_bits_are_compared_where_nothing_was_measured(data: Json) -> None:
    first, second = pair_of(data)
    for shown, bits in ((first, 4), (second, 2)):
        shown["errors"] = None
        for layer in shown["layers"]:
            layer["weight_bits"] = layer["weight_bits"] and bits
    found = differences(first, second, LAST)["layers"]
    assert len(found) == sum(layer["weight_bits"] is not None for layer in first["layers"]) > 0
    assert all(row["bits"][1].startswith("W2") and row["change"] is None for row in found)
