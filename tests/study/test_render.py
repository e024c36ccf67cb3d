"""The table: its layout, its statistics by another route, and what is said of missing and failed cells."""

from __future__ import annotations

import csv
import io
import math
from typing import Any

import pytest
from scipy.stats import ttest_1samp

from ptq_tdq.errors import UsageError
from ptq_tdq.study.render import differences, find_metric, listing, make_table, markdown, to_csv

METRIC = find_metric("fd-c10")


def line(method: str, seed: int, value: float | None, scheme: str = "W4A8", **changes: Any) -> dict[str, Any]:
    full = method == "fp"
    found = {
        "preset": "" if full else "qdiff",
        "scheme": "" if full else scheme,
        "method": method,
        "seed": seed,
        "evaluation": {"samples": 9, "num_inference_steps": 2, "seed": seed},
        "results": {"fd_c10": value},
    }
    return {**found, **changes}


LINES = [
    *(line("fp", seed, 1.0 + seed) for seed in range(3)),
    *(line("static", seed, value) for seed, value in enumerate((3.0, 4.0, 6.0))),
    *(line("tdq", seed, value) for seed, value in enumerate((2.0, 3.2, 4.9))),
    line("S_20", 0, 2.5, "W4A6"),
    line("tdq-thin:bias_lr=0", 0, 2.25, "W4A6"),
]


def cells(text: str, start: str) -> list[str]:
    row = next(row for row in text.splitlines() if row.startswith(start))
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_columns_stand_in_the_order_of_the_paper_s_table_with_full_precision_last() -> None:
    text = markdown(make_table(LINES, METRIC))
    expected = ["preset", "scheme", "TDQ", "S_1", "S_20", "TDQ_thin:bias_lr=0", "FP"]
    assert cells(text, "| preset") == expected
    assert cells(text, "| qdiff | W4A6") == [
        "qdiff",
        "W4A6",
        "-",
        "-",
        "2.500 (n = 1)",
        "2.250 (n = 1)",
        "2.000 ± 1.000",
    ]
    assert "9 samples, 2 steps" in text and "lower is better" in text


def test_mean_deviation_and_the_paired_test_by_the_textbook() -> None:
    table = make_table(LINES, METRIC)
    entry = table.rows["qdiff", "W4A8"]["static"]
    assert entry.mean == pytest.approx(13 / 3) and entry.deviation == pytest.approx(math.sqrt(7 / 3))
    found = differences(table).get((("qdiff", "W4A8"), "tdq"))
    assert found is not None and found.seeds == 3 and found.mean == pytest.approx((-1.0 - 0.8 - 1.1) / 3)
    spread = math.sqrt(sum((d - found.mean) ** 2 for d in (-1.0, -0.8, -1.1)) / 2 / 3)
    t = found.mean / spread
    p = 1 - abs(t) / math.sqrt(t * t + 2)  # Student's t with 2 degrees of freedom, in closed form
    assert found.p == pytest.approx(p)
    low, high = ttest_1samp([-1.0, -0.8, -1.1], 0).confidence_interval(0.95)
    assert found.interval == pytest.approx((low, high))
    assert f"**-0.967** [{low:+.3f}, {high:+.3f}] ({p:.2g})" in markdown(table)


def test_p_values_are_corrected_for_their_number() -> None:
    """Holm's procedure on the p values 0.01, 0.04, 0.03 and 0.005, as R's p.adjust(c(...), "holm") gives it."""
    changes = [two_seeds(p) for p in (0.01, 0.04, 0.03, 0.005)]
    lines = [line("static", seed, 0.0) for seed in range(2)]
    for i, pair in enumerate(changes, 2):
        lines += [line(f"S_{i}", seed, value) for seed, value in enumerate(pair)]
    found = differences(make_table(lines, METRIC))
    corrected = [found[("qdiff", "W4A8"), f"S_{i}"].p for i in range(2, 6)]
    assert corrected == pytest.approx([0.03, 0.06, 0.06, 0.02])


def two_seeds(p: float) -> tuple[float, float]:
    """Two differences whose t-test gives ``p``: with one degree of freedom, t = cot(pi p / 2)."""
    t = 1 / math.tan(math.pi * p / 2)
    return t + 1, t - 1


def test_only_seeds_that_both_have_are_compared() -> None:
    table = make_table([*LINES[:5], *(line("tdq", seed, 9.0) for seed in (1, 2))], METRIC)
    found = differences(table).get((("qdiff", "W4A8"), "tdq"))
    assert found is not None and (found.mean, found.seeds, found.p) == (5.0, 1, None)
    assert (("qdiff", "W4A8"), "S_4") not in differences(table)


def test_a_difference_of_fewer_seeds_says_of_how_many_and_names_keep_the_table_whole() -> None:
    lines = [*LINES[:6], *(line("tdq-thin:skip=a|b", seed, 9.0) for seed in (2, 3))]
    table = make_table(lines, METRIC)
    for text in (markdown(table), listing([table])):
        assert "+3.000 (n = 1)" in text and r"TDQ_thin:skip=a\|b" in text


def test_equal_differences_have_no_p_value() -> None:
    lines = [line(method, seed, seed + add) for seed in (0, 1) for method, add in (("static", 0.0), ("tdq", 1.0))]
    found = differences(make_table(lines, METRIC)).get((("qdiff", "W4A8"), "tdq"))
    assert found is not None and found.p is None


def test_a_calibration_that_diverged_is_said_to_fail() -> None:
    failed = {"results": {}, "failed": "NaN at t = 3"}
    lines = [*LINES, line("S_2", 0, None, **failed), line("S_4", 0, None, **failed), line("S_4", 1, 7.0)]
    text = markdown(make_table(lines, METRIC))
    assert cells(text, "| qdiff | W4A8")[4:6] == ["fails", "7.000 (1 failed)"]


def test_the_csv_has_the_same_numbers() -> None:
    table = make_table(LINES, METRIC)
    first, second = csv.DictReader(io.StringIO(to_csv(table)))
    assert (first["preset"], first["scheme"], first["metric"]) == ("qdiff", "W4A8", "fd_c10")
    assert float(first["TDQ mean"]) == pytest.approx(10.1 / 3) and first["TDQ seeds"] == "3"
    assert float(first["TDQ minus S_1"]) == pytest.approx(-2.9 / 3) and 0 < float(first["TDQ p"]) < 0.05
    assert second["TDQ mean"] == "" and float(second["FP deviation"]) == 1.0


@pytest.mark.parametrize("size", [{"samples": 8}, {"num_inference_steps": 3}])
def test_cells_measured_on_other_samples_or_steps_are_not_mixed(size: dict[str, int]) -> None:
    other = {**LINES[0]["evaluation"], **size}
    with pytest.raises(UsageError, match=r"qdiff W4A8 is measured on several numbers of \(samples, steps\)"):
        make_table([*LINES, line("S_2", 0, 3.0, evaluation=other)], METRIC)
    apart = make_table(
        [*LINES, line("S_2", 0, 3.0, "W2A2", evaluation=other), line("fp", 0, 9.0, evaluation=other)], METRIC
    )
    assert apart.rows["qdiff", "W2A2"]["fp"].values == {0: 9.0}
    assert apart.rows["qdiff", "W4A8"]["fp"].values == {0: 1.0, 1: 2.0, 2: 3.0}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_sha256": "n"}, "of different models"),
        ({"model_sha256": "m", "sampling_sha256": "q"}, "of different prompts"),
        ({"model_sha256": "m", "sampling_sha256": "p", "choices": {"x": 2, "seed": 3}}, "different choices"),
    ],
)
def test_what_was_measured_of_different_things_is_not_averaged(changes: dict[str, Any], said: str) -> None:
    own = {"model_sha256": "m", "sampling_sha256": "p", "choices": {"x": 1, "seed": 0}}
    lines = [{**each, **own} for each in LINES]
    make_table([*lines, line("static", 3, 3.0, **{**own, "choices": {"x": 1, "seed": 3}})], METRIC)
    with pytest.raises(UsageError, match=said):
        make_table([*lines, line("static", 3, 3.0, **changes)], METRIC)


def test_metrics_of_pairs_have_no_full_precision_column() -> None:
    lines = [{**each, "results": {"latent_sqnr_db": 20.0}} for each in LINES if each["method"] != "fp"]
    full = [{**each, "results": {"fd_c10": 1.0}} for each in LINES if each["method"] == "fp"]
    text = markdown(make_table([*full, *lines], find_metric("latent-sqnr")))
    assert "| FP |" not in text and "higher is better" in text


def test_unknown_metrics_and_metrics_that_no_line_has_are_refused() -> None:
    with pytest.raises(UsageError, match="no metric 'fid2'; the metrics are"):
        find_metric("fid2")
    with pytest.raises(UsageError, match="No line has the metric fid;"):
        make_table(LINES, find_metric("fid"))
    for unfinished in ([], [line("fp", 0, 9.0)]):
        with pytest.raises(UsageError, match="no finished cell"):
            make_table(unfinished, METRIC)


def test_every_row_may_be_compared_with_s_1_of_one_preset() -> None:
    ours = [line(method, seed, value - 2, preset="default") for method in ("static", "tdq")
            for seed, value in enumerate((3.0, 4.5, 6.0))]  # fmt: skip
    table = make_table([*LINES, *ours], METRIC, against="qdiff")
    for column in ("static", "tdq"):
        found = differences(table).get((("default", "W4A8"), column))
        assert found is not None and found.seeds == 3 and math.isclose(found.mean, -2 + 0.5 / 3)
    text = markdown(table).partition("Difference to S_1 of preset qdiff")[2]
    assert cells(text, "| preset") == ["preset", "scheme", "TDQ", "S_1", "S_20", "TDQ_thin:bias_lr=0"]
    assert cells(text, "| qdiff | W4A8")[3] == "-" and cells(text, "| default | W4A8")[3].startswith("**-1.833**")
    with pytest.raises(UsageError, match="has no S_1 of the preset paper;"):
        make_table(LINES, METRIC, against="paper")
    longer = line("tdq", 0, 1.0, preset="default", evaluation={"samples": 9, "num_inference_steps": 3, "seed": 0})
    with pytest.raises(UsageError, match="samples and steps of S_1 of the preset qdiff"):
        make_table([*LINES, longer], METRIC, against="qdiff")


def test_a_list_has_a_line_per_method_and_compares_with_any_of_them() -> None:
    lines = [{**each, "results": {**each["results"], "kid_c10": 0.5 + each["seed"]}} for each in LINES]
    tables = [make_table(lines, find_metric(name), against=":tdq") for name in ("fd-c10", "kid-c10")]
    text = listing(tables)
    assert cells(text, "| preset")[3:] == [
        "FD-C10, lower is better", "difference", "KID-C10, lower is better", "difference",
    ]  # fmt: skip
    found = differences(make_table(lines, METRIC, against=":tdq"))[("qdiff", "W4A8"), "static"]
    assert found.interval is not None
    low, high = found.interval
    change = f"+0.967 [{low:+.3f}, {high:+.3f}] ({found.p:.2g})"
    assert cells(text, "| qdiff | W4A8 | S_1")[3:5] == ["4.333 ± 1.528", change]
    assert cells(text, "| qdiff | W4A8 | TDQ")[4] == "-" and cells(text, "| qdiff | W4A8 | FP")[4] == "-"
    assert cells(text, "| qdiff | W4A6 | S_20")[3:5] == ["2.500 (n = 1)", "-"], "no TDQ in this row"
    assert "difference to TDQ on the same seeds" in text
    sized = [{**each, "size": {"mean_bits": {"weights": 4.5, "activations": 8}, "bytes": 3e6}} for each in lines]
    assert cells(listing([make_table(sized, METRIC)]), "| qdiff | W4A8 | TDQ")[3:6] == ["4.50", "8.00", "3.00"]
    with pytest.raises(UsageError, match="has no TDQ_thin; --against takes"):
        make_table(LINES, METRIC, against=":tdq-thin")
