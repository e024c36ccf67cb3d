"""``ptq-tdq benchmark`` from end to end: cells, kills, processes and the table."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from commands import running

FEW = ("samples_per_step=4", "calibration_steps=2", "num_inference_steps=2", "batch_size=4", "weight_iterations=2")
MATRIX = ("--schemes", "W4A8,W4A6", "--methods", "S_1", "--seeds", "0,1", "--samples", "8")
METRIC = ("--metric", "latent-sqnr")


@pytest.fixture(scope="module")
def study(pipeline: Path) -> tuple[str, ...]:
    """Build a study of 6 cells of a second each."""
    quick = ("activation_iterations=2", "activation_range=minmax", "weight_range=minmax")
    settings = [part for choice in (*FEW, *quick) for part in ("--set", choice)]
    return ("benchmark", "--model", str(pipeline), *MATRIX, *settings, "--threads", "1", *METRIC)


def measured(path: Path) -> dict[tuple[str, str, int], Any]:
    """What the lines say, without what depends on the day."""
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    return {(d["scheme"], d["method"], d["seed"]): (d["results"], d.get("loss")) for d in lines}


@pytest.fixture(scope="module")
def whole(study: tuple[str, ...], cli: Any, shared_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the study without interruption."""
    results = tmp_path_factory.mktemp("study") / "whole.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PTQ_TDQ_CACHE", str(shared_cache))
        result = cli(*study, "--results", results, "--grids", results.with_name("grids"))
    assert (result.code, result.err) == (0, "")
    assert "| default | W4A6 |" in result.out
    pictures = sorted(path.name for path in results.with_name("grids").iterdir())
    assert pictures == [f"default-{scheme}-static-{seed}-2steps.png" for scheme in ("W4A6", "W4A8") for seed in (0, 1)]
    return Path(results)


def test_each_cell_is_a_line_with_all_that_it_stands_for(whole: Path) -> None:
    lines = [json.loads(text) for text in whole.read_text().splitlines()]
    assert len(lines) == len(measured(whole)) == 6
    for line in lines[2:]:
        assert line["choices"]["weights"]["weight_iterations"] == 2 and line["choices"]["seed"] == line["seed"]
        assert line["results"]["latent_sqnr_db"] > 0 and line["evaluation"]["samples"] == 8
        assert {"cpu", "torch", "commit", "command", "threads"} <= line["facts"].keys()
    found = measured(whole)
    for seed in (0, 1):
        weights = {found[scheme, "static", seed][1]["weights"] for scheme in ("W4A8", "W4A6")}
        assert len(weights) == 1, "one weight phase for all cells of a seed"
    assert not whole.with_name("whole.jsonl.work").exists()


def test_the_table_comes_from_the_lines_alone(whole: Path, cli: Any, tmp_path: Path) -> None:
    drawn = cli("benchmark", "--render", whole, *METRIC)
    assert cli("benchmark", "--render", whole).out == drawn.out, "a user's own model has no classifier"
    assert (drawn.code, drawn.err) == (0, "") and "| default | W4A8 |" in drawn.out and "| S_1 |" in drawn.out
    out = tmp_path / "table.csv"
    result = cli("benchmark", "--render", whole, *METRIC, "--format", "csv", "--output", out)
    assert (result.code, result.out) == (0, "") and out.read_text().startswith("preset,scheme,metric,S_1 mean")
    two = ("--metric", "latent-sqnr,mean-noise-sqnr")
    listed = cli("benchmark", "--render", whole, *two, "--format", "list", "--against", ":static")
    assert listed.code == 0 and listed.out.count("| default | W4A8 | ") == 1 and "to S_1 on the same" in listed.out
    document = json.loads(cli("benchmark", "--render", whole, *two, "--json").out)
    assert (document["results"], document["cells"]) == (str(whole), len(whole.read_text().splitlines()))
    assert [table["metric"] for table in document["tables"]] == ["latent_sqnr_db", "mean_noise_sqnr_db"]
    entries = [entry for entry in document["tables"][0]["entries"] if entry["method"] != "fp"]
    values = {(e["scheme"], e["method"], int(seed)): value for e in entries for seed, value in e["values"].items()}
    assert values == {key: found["latent_sqnr_db"] for key, (found, *_) in measured(whole).items() if key[1] != "fp"}
    refused = cli("benchmark", "--render", whole, *two, "--format", "csv")
    assert refused.code != 0 and "one --metric" in refused.err


def test_shards_joined_by_concatenation_are_the_whole_study(study: Any, whole: Path, cli: Any, tmp_path: Path) -> None:
    parts = [tmp_path / f"{number}.jsonl" for number in range(2)]
    for number, part in enumerate(parts):
        result = cli(*study, "--results", part, "--shard", f"{number}/2")
        assert (result.code, result.out, result.err) == (0, "", "")
    joined = tmp_path / "joined.jsonl"
    joined.write_text("".join(part.read_text() for part in parts))
    assert measured(joined) == measured(whole) and len(measured(parts[0])) == 3
    tables = [cli("benchmark", "--render", path, *METRIC).out for path in (joined, whole)]
    assert tables[0] == tables[1]


@pytest.mark.parametrize("shard", ["2/2", "0", "-1/2", "0/0", "1/x", "1/99999999"])
def test_what_is_no_shard_is_one_sentence(shard: str, study: Any, cli: Any, tmp_path: Path) -> None:
    result = cli(*study, "--results", tmp_path / "a.jsonl", "--shard", shard)
    assert result.code == 2 and f"'{shard}' is no shard; write I/N" in result.err


def test_a_finished_study_runs_nothing_and_another_one_is_refused(study: Any, whole: Path, cli: Any) -> None:
    before = whole.read_bytes()
    assert cli(*study, "--results", whole).code == 0
    assert whole.read_bytes() == before
    other = cli(*study, "--results", whole, "--set", "bias_lr=0.5")
    assert other.code == 2 and other.err.count("\n") == 1 and "bias_lr" in other.err


def test_samples_may_come_from_integers_and_a_method_without_tables_says_that_its_do_not(
    study: Any, whole: Path, cli: Any, tmp_path: Path
) -> None:
    results = tmp_path / "integer.jsonl"
    fewer = ("--schemes", "W4A8", "--methods", "S_1,dynamic", "--seeds", "0", "--backend", "integer")
    assert cli(*study, *fewer, "--results", results).code == 0
    lines = [json.loads(text) for text in results.read_text().splitlines()]
    assert [(line["method"], line.get("choices", {}).get("backend")) for line in lines] == [
        ("fp", None),
        ("static", "integer"),
        ("dynamic", "simulated"),
    ]
    simulated, integer = measured(whole)["W4A8", "static", 0][0], lines[1]["results"]
    assert integer["latent_sqnr_db"] != simulated["latent_sqnr_db"]
    assert integer["latent_sqnr_db"] == pytest.approx(simulated["latent_sqnr_db"], abs=1)
    other = cli(*study, *fewer[:-1], "simulated", "--results", results)
    assert other.code == 2 and "backend integer" in other.err


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_a_study_of_two_processes_is_run_once_at_a_time_and_goes_on_after_a_kill_with_the_numbers_of_one(
    study: Any, whole: Path, cli: Any, tmp_path: Path
) -> None:
    results = tmp_path / "two.jsonl"
    command = (*study, "--results", results, "--workers", "2", "--threads", "2", "--verbose")
    with running(*command) as process:
        process.wait_for(lambda: results.exists() and results.read_bytes().count(b"\n") >= 3)
        process.send(signal.SIGSTOP)
        second = cli(*study, "--results", results)
        assert (second.code, second.err.count("\n")) == (1, 1)
        assert f"Another run works in '{results}.work'; wait" in second.err
        pid = process.process.pid
        born = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        process.send(signal.SIGKILL)
        assert process.end()[0] == -signal.SIGKILL
    assert len(born) >= 2
    deadline = time.monotonic() + 60
    while any(_alive(pid) for pid in born):
        assert time.monotonic() < deadline, "a worker outlives its parent"
        time.sleep(0.05)
    assert len(measured(results)) < 6
    result = cli(*command)
    assert result.code == 0, result.err
    assert measured(results) == measured(whole)
    assert "default W4A6 S_1 seed " in result.err and "no cell left" in result.err


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def test_bad_requests_are_one_line(cli: Any, tmp_path: Path) -> None:
    for words, flags in (
        ("no metric 'fid3'", ("--metric", "fid3")),
        ("names no metric", ("--metric", ",")),
        ("has no S_4; --against takes", ("--against", ":S_4", "--methods", "S_1")),
        ("has no S_1 of the preset qdiff", ("--against", "qdiff")),
        ("is a file", ("--grids", __file__)),
        *(
            ("--render runs no cells; leave out --", ("--render", __file__, flag, value))
            for flag, value in {
                "--seeds": 1,
                "--methods": "tdq",
                "--results": "x",
                "--shard": "0/2",
                "--grids": "x",
            }.items()
        ),
        ("There is no results file", ("--render", tmp_path / "absent")),
        ("--seeds takes numbers", ("--seeds", "a")),
        ("method", ("--methods", "S_x")),
        ("no choice named", ("--set", "x=1")),
    ):
        result = cli("benchmark", *flags)
        assert (result.code, result.out, result.err.count("\n")) == (2, "", 1) and words in result.err, result.err
    result = cli("benchmark", "--grids", Path(__file__) / "grids")
    assert (result.code, result.err.count("\n")) == (1, 1) and "cannot be written" in result.err
