"""Which cells a study has, which choices stand behind each, and what they share."""

from __future__ import annotations

from typing import Any

import pytest

from ptq_tdq.config import preset
from ptq_tdq.errors import ConfigError, SchemeError
from ptq_tdq.study.matrix import FULL_PRECISION, Cell, make_cells
from ptq_tdq.study.run import next_cell, seconds_left


def cells(**changes: Any) -> list[Cell]:
    request: dict[str, Any] = {
        "presets": ["qdiff"],
        "schemes": ["W4A8", "W4A6"],
        "methods": ["tdq", "S_1"],
        "seeds": [0, 1],
        "settings": (),
        "samples": 1000,
        "backend": "simulated",
    }
    return make_cells(**{**request, **changes})


def test_every_combination_is_a_cell_after_full_precision_seed_by_seed() -> None:
    found = cells()
    assert [cell.key for cell in found[:2]] == [("", "", FULL_PRECISION, 0), ("", "", FULL_PRECISION, 1)]
    assert [cell.key for cell in found[2:]] == [
        ("qdiff", scheme, method, seed)
        for seed in (0, 1)
        for scheme in ("W4A8", "W4A6")
        for method in ("tdq", "static")
    ]
    assert all(cell.config.preset == "qdiff" and cell.config.method == cell.method for cell in found[2:])
    assert len(cells(methods=["S_1", "static", "S_1"])) == 2 + 4, "S_1 is static"


def test_settings_hold_for_all_presets_or_for_one() -> None:
    settings = ["qdiff:weight_iterations=7", "weight_iterations=3", "batch-size=4"]
    found = cells(presets=["qdiff", "paper"], settings=settings, seeds=[0])
    iterations = {cell.preset: cell.config.weights.weight_iterations for cell in found if cell.preset}
    assert iterations == {"qdiff": 7, "paper": 3}
    assert {cell.config.learning.batch_size for cell in found} == {4}


def test_a_method_with_changed_choices_is_a_column_of_its_own() -> None:
    label = "tdq-thin:module_start=static+bias_lr=0+eight_bit_layers=first/last"
    (cell,) = cells(methods=[label], schemes=["W4A8"], seeds=[3], settings=["module_start=as-is"])[1:]
    assert cell.method == label and cell.seed == 3
    assert (cell.config.method, cell.config.intervals.module_start, cell.config.learning.bias_lr) == (
        "tdq-thin",
        "static",
        0.0,
    )
    assert cell.config.layers.eight_bit_layers == ("first", "last")


def test_full_precision_is_sampled_once_for_each_number_of_steps() -> None:
    found = cells(presets=["qdiff", "paper"], settings=["qdiff:num_inference_steps=30"], seeds=[0])
    steps = [cell.config.calibration.num_inference_steps for cell in found if cell.method == FULL_PRECISION]
    assert steps == [30, 20]


def test_a_correction_is_named_like_a_choice_and_shares_the_weights() -> None:
    plain, mended = cells(methods=["tdq", "tdq:correction=ptqd"], schemes=["W4A8"], seeds=[0])[1:]
    assert (plain.correction, mended.correction) == ("none", "ptqd")
    assert plain.config == mended.config and plain.resources == mended.resources
    assert mended.same({"evaluation": mended.evaluation, "choices": mended.choices})
    assert not mended.same({"evaluation": mended.evaluation, "choices": plain.choices})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"presets": ["none"]}, "preset must be one of"),
        ({"methods": ["S_0"]}, "S_0"),
        ({"methods": ["tdq:x"]}, "takes KEY=VALUE"),
        ({"settings": ["qdif:batch_size=4"]}, "'qdif'; the presets are"),
        ({"settings": ["batch_size"]}, "takes KEY=VALUE"),
        ({"settings": ["iterations=4"]}, "no choice named 'iterations'"),
        ({"settings": ["seed=4"]}, "a dimension of the study; name it by --seeds"),
        ({"methods": ["tdq:scheme=W2A2"]}, "a dimension of the study"),
        ({"methods": ["tdq:correction=x"]}, "correction must be one of none, ptqd"),
        ({"methods": []}, "no cells"),
    ],
)
def test_bad_requests_are_refused_before_anything_runs(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cells(**changes)
    with pytest.raises(SchemeError):
        cells(schemes=["W4"])


def shared(a: Cell, b: Cell) -> set[str]:
    return {name.split()[0] for name in a.resources & b.resources}


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ({"method": "tdq"}, {"baseline", "weights", "calibration"}),
        ({"method": "tdq", "activation_iterations": 3}, {"baseline", "weights", "calibration"}),
        ({"scheme": "W4A6"}, {"baseline", "calibration"}),  # what is rotated depends on its inputs' bits
        ({"scheme": "W3A8"}, {"baseline", "calibration"}),
        ({"weight_iterations": 5}, {"baseline", "calibration"}),
        ({"samples_per_step": 5}, {"baseline"}),
        ({"num_inference_steps": 50}, set()),
        ({"seed": 1}, set()),
    ],
)
def test_cells_share_what_their_choices_agree_on(other: dict[str, Any], expected: set[str]) -> None:
    first, second = (
        Cell("default", config.scheme, config.method, config, samples=8)
        for config in (preset("default"), preset("default", **other))
    )
    assert shared(first, second) == expected


def test_a_cell_waits_for_the_one_that_makes_its_weights_and_no_longer() -> None:
    full0, full1, *rest = cells()
    made: set[str] = set()
    assert next_cell([full1, *rest], [full0], made) == full1
    assert next_cell(rest, [full0, full1], made) is None
    made |= full0.resources | full1.resources
    first = next_cell(rest, [], made)
    assert first == rest[0]
    assert next_cell(rest[1:], [first], made) == rest[4], "the next seed has other weights"
    made |= first.resources
    assert next_cell(rest[1:], [rest[4]], made) == rest[1]


def line(cell: Cell, **seconds: float) -> dict[str, Any]:
    return {"preset": cell.preset, "seconds": seconds}


def test_the_time_left_counts_each_weight_phase_once() -> None:
    found = cells(seeds=[0, 1])
    full, rest = found[0], found[2:]
    assert seconds_left(rest, [], 1) is None
    lines = [line(full, evaluation=50.0), line(rest[0], weights=1000.0, activations=100.0, evaluation=10.0)]
    seed1 = [cell for cell in rest if cell.seed == 1]
    assert seconds_left(seed1, lines, 1) == 1000 + 4 * 110
    assert seconds_left(seed1, lines, 2) == 720
    other = cells(presets=["paper"], seeds=[0])[1:]
    assert seconds_left(other, lines, 1) == 1000 + 4 * (100 + 30), "a preset without cells yet takes all presets' mean"
