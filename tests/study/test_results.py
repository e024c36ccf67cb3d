"""The results file under kills, damage and foreign studies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ptq_tdq.errors import OutputError, UsageError
from ptq_tdq.study.matrix import Cell, make_cells
from ptq_tdq.study.results import append_line, read_lines, unfinished
from ptq_tdq.study.run import run_study, work_folder


def make(**changes: Any) -> list[Cell]:
    request: dict[str, Any] = {
        "presets": ["default"],
        "schemes": ["W4A8"],
        "methods": ["tdq"],
        "seeds": [0],
        "settings": (),
        "samples": 1000,
        "backend": "simulated",
    }
    return make_cells(**{**request, **changes})


def line(cell: Cell, **changes: Any) -> dict[str, Any]:
    found = {
        "preset": cell.preset,
        "scheme": cell.scheme,
        "method": cell.method,
        "seed": cell.seed,
        "evaluation": cell.evaluation,
        "choices": cell.choices,
        "model_sha256": "m",
        "results": {"fd_c10": 1.0},
    }
    return {**found, **changes}


def test_what_is_appended_is_read(tmp_path: Path) -> None:
    path = tmp_path / "new" / "r.jsonl"
    assert read_lines(path) == []
    lines = [line(cell) for cell in make(seeds=[0, 1])]
    for each in lines:
        append_line(path, each)
    assert read_lines(path) == lines


@pytest.mark.parametrize("cut", [2, 20, 10_000])
def test_a_line_that_a_kill_cut_off_does_not_count_and_is_replaced(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "r.jsonl"
    full, cell = make()
    append_line(path, line(full))
    whole = path.read_bytes()
    append_line(path, line(cell))
    path.write_bytes(path.read_bytes()[: max(len(whole), len(path.read_bytes()) - cut)])
    assert read_lines(path) == [line(full)]
    append_line(path, line(cell))
    assert read_lines(path) == [line(full), line(cell)]


@pytest.mark.parametrize("kept", [1, 2, 30])
def test_the_first_line_may_be_cut_off_anywhere(tmp_path: Path, kept: int) -> None:
    path, (full, _) = tmp_path / "r.jsonl", make()
    append_line(path, line(full))
    path.write_bytes(path.read_bytes()[:kept])
    assert read_lines(path) == []
    append_line(path, line(full))
    assert read_lines(path) == [line(full)]


def test_a_last_line_without_an_end_blank_lines_and_a_mark_of_its_bytes_do_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    full, cell = make()
    append_line(path, line(full))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\n\n") + json.dumps(line(cell)).encode())
    assert read_lines(path) == [line(full), line(cell)]
    append_line(path, line(cell))
    assert read_lines(path) == [line(full), line(cell), line(cell)]


@pytest.mark.parametrize(
    "changes",
    [
        {"evaluation": {}},
        {"evaluation": {"samples": "8", "num_inference_steps": 2, "seed": 0}},
        {"evaluation": {"samples": True, "num_inference_steps": 2, "seed": 0}},
        {"results": {"fd_c10": "1"}},
        {"results": {"fd_c10": float("nan")}},
        {"results": {"fd_c10": 1e308}},
        {"results": {"fd_c10": 10**400}},
        {"choices": "x"},
        {"choices": None},
        {"seconds": {"weights": "1"}},
        {"results": {"fd_c10": {"a": 1}}},
        {"size": 3},
        {"size": {"bytes": 1}},
        {"size": {"bytes": "1", "mean_bits": {"weights": 4.0, "activations": 8.0}}},
        {"method": "\x1b[2Jtdq"},
        {"preset": "a\nb"},
    ],
)
def test_a_line_that_no_table_can_be_made_of_is_one_sentence(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps(line(make()[1], **changes)) + "\n")
    with pytest.raises(UsageError, match=r"Line 1 of .* is no result"):
        read_lines(path)


def test_two_lines_of_a_cell_say_the_same(tmp_path: Path) -> None:
    path, (full, cell) = tmp_path / "r.jsonl", make()
    for one in (line(full), line(cell), line(cell, seconds={"weights": 1.0}), line(cell, results={"fd_c10": 2.0})):
        append_line(path, one)
    with pytest.raises(UsageError, match=r"Line 4 of .* has other results than an earlier line of the same cell"):
        read_lines(path)


def test_finished_cells_are_left_out() -> None:
    found = make(seeds=[0, 1])
    assert unfinished(found, [], "m") == found
    assert unfinished(found, [line(found[0]), line(found[2])], "m") == [found[1], found[3]]


@pytest.mark.parametrize(
    ("now", "message"),
    [
        ({"settings": ["bias_lr=0.5"]}, r"'default W4A8 tdq 0' with bias_lr 0.001 where this study has 0.5"),
        ({"samples": 8}, r"'fp 0' with samples 1000 where this study has 8"),
        ({"settings": ["num_inference_steps=50"]}, r"'default W4A8 tdq 0' with num_inference_steps 25 where this"),
    ],
)
def test_another_study_in_the_file_is_refused(now: dict[str, Any], message: str) -> None:
    lines = [line(cell) for cell in make()]
    with pytest.raises(UsageError, match=message):
        unfinished(make(**now), lines, "m")


def test_presets_may_differ_in_their_steps() -> None:
    cells = make(presets=["default", "qdiff"])
    assert [cell.evaluation["num_inference_steps"] for cell in cells] == [25, 100, 25, 100]
    assert unfinished(cells, [line(cell) for cell in cells], "m") == []
    assert unfinished(cells, [line(cells[0]), line(cells[2])], "m") == [cells[1], cells[3]]


def test_another_model_in_the_file_is_refused() -> None:
    with pytest.raises(UsageError, match="another model"):
        unfinished(make(), [line(cell) for cell in make()], "other")


def test_other_prompts_in_the_file_are_refused_where_lines_know_theirs() -> None:
    lines = [line(cell, sampling_sha256="p") for cell in make()]
    assert unfinished(make(), lines, "m", "p") == [] == unfinished(make(), [line(cell) for cell in make()], "m", "q")
    with pytest.raises(UsageError, match="other prompts"):
        unfinished(make(), lines, "m", "q")


@pytest.mark.parametrize("text", ["{}\n", "[1]\n", "text\n", "\0\n", '{"choices": {}}\n', "a line", "[1, ", "\0"])
def test_a_file_of_anything_else_is_one_sentence_and_loses_nothing(tmp_path: Path, text: str) -> None:
    path, (full, _) = tmp_path / "r.jsonl", make()
    path.write_text(text)
    with pytest.raises(UsageError, match=r"Line 1 of .* is no result"):
        read_lines(path)
    append_line(path, line(full))
    assert path.read_text().startswith(text)


def test_what_others_keep_beside_shared_weights_outlives_a_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = tmp_path / "r.jsonl"
    for name in ("weights-0/unit", "pictures/a.png"):
        (work_folder(results) / name).parent.mkdir(parents=True)
        (work_folder(results) / name).touch()
    monkeypatch.setattr("ptq_tdq.study.run.run_here", lambda *_: iter(()))
    say = dict.fromkeys(("on_line", "on_say"), print)
    run_study([], results, source=None, given={}, command="", count=1, grids=work_folder(results) / "pictures", **say)
    assert [path.name for path in work_folder(results).rglob("*")] == ["pictures", "a.png"]


def test_a_file_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        append_line(tmp_path / "file" / "r.jsonl", {})


def test_a_link_to_a_results_file_is_the_same_study(tmp_path: Path) -> None:
    results, link = tmp_path / "study.jsonl", tmp_path / "elsewhere" / "link.jsonl"
    link.parent.mkdir()
    link.symlink_to(results)
    assert work_folder(link) == work_folder(results)
