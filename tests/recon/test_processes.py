"""Several processes against one: the same codes and tables, also when one of them is killed and others go on."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import in_processes
from small_denoiser import SmallDenoiser
from torch import Tensor

from ptq_tdq import Calls, QuantizedModel, calibrate, preset, processes, record
from ptq_tdq.errors import CalibrationSetError, ConfigError, ModelError, NonFiniteError, WorkerError
from ptq_tdq.recon import UnitReport, engine
from ptq_tdq.recon.streams import UnitCall

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked")
FEW = {"weight_iterations": 3, "activation_iterations": 3, "batch_size": 8, "compute_dtype": "float32"}
QUICK = {"activation_range": "minmax", "weight_range": "minmax"}
NEAREST = {"rounding": "nearest", "activation_iterations": 0, **QUICK}


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of four samples, none of which is cut: their sums are the same in any process."""
    monkeypatch.setattr(engine, "at_once", lambda size: 4)


def tensors(quantized: QuantizedModel) -> dict[str, Tensor]:
    """All that a run has decided, as it is saved."""
    artifact = quantized.to_artifact()
    found = {f"{name}.codes": value for name, value in artifact.weight_codes.items()}
    found |= {f"{name}.scale": value for name, value in artifact.weight_scale.items()}
    found |= {key: value for name, table in artifact.tables.items() for key, value in table.tensors(name).items()}
    return found | artifact.float_state


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal codes and zero points, and floating point within a tolerance."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-4, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.fixture
def denoiser() -> SmallDenoiser:
    torch.manual_seed(0)
    return SmallDenoiser().requires_grad_(False)


@pytest.fixture
def calls(denoiser: SmallDenoiser) -> Calls:
    """24 calls of two sizes, which no call of the model can mix."""
    with record(denoiser) as recorded, torch.no_grad():
        for size in (6, 4):
            denoiser(torch.randn(12, 3, size, size), torch.tensor([999.0, 500.0, 1.0]).repeat(4))
    return recorded


@pytest.mark.parametrize(
    ("name", "choices", "count"),
    [
        ("default", {"scheme": "W4A6"}, 2),
        ("default", {"scheme": "W3A4", "loss_weights": "relative", "equalize": "channels", **QUICK}, 3),
        ("paper", {"scheme": "W4A8", **QUICK}, 2),
    ],
    ids=["default", "learned", "paper"],
)
def test_processes_give_the_codes_and_tables_of_one(
    name: str, choices: dict[str, Any], count: int, denoiser: SmallDenoiser, calls: Calls, tmp_path: Path
) -> None:
    config = preset(name, **FEW, **choices)
    expected = tensors(calibrate(denoiser, config, calls))
    for found in in_processes(count, tmp_path, lambda rank: tensors(calibrate(denoiser, config, calls))):
        assert_close(found, expected)


def test_each_process_has_the_streams_of_its_own_calls(
    denoiser: SmallDenoiser, calls: Calls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(rank: int) -> int:
        rows, learn = set[int](), engine.reconstruct_weights

        def look(unit: Any, full: UnitCall, mine: UnitCall, *rest: Any) -> tuple[float, float]:
            rows.update(sum(len(part.real(part.samples)[0]) for part in call.arguments.parts) for call in (full, mine))
            return learn(unit, full, mine, *rest)

        monkeypatch.setattr(engine, "reconstruct_weights", look)
        calibrate(denoiser, preset("qdiff", **NEAREST), calls)
        (own,) = rows
        return own

    assert in_processes(2, tmp_path, work) == [12, 12]


@pytest.mark.parametrize("dead", [0, 1])
def test_a_killed_process_ends_the_run_and_another_number_goes_on(
    dead: int, denoiser: SmallDenoiser, calls: Calls, tmp_path: Path
) -> None:
    config, folder = preset("default", scheme="W4A6", **FEW, **QUICK), tmp_path / "run"
    folder.mkdir()

    def work(rank: int) -> None:
        def die(report: UnitReport) -> None:
            if rank == dead and report.phase == "activations" and report.index == 1:
                os.kill(os.getpid(), signal.SIGKILL)

        calibrate(denoiser, config, calls, run_directory=folder, on_unit=die)

    found = in_processes(2, tmp_path, work)
    assert found[dead] is None
    assert isinstance(found[1 - dead], WorkerError) and "Another process of the run" in str(found[1 - dead])
    reports: list[UnitReport] = []
    resumed = calibrate(denoiser, config, calls, run_directory=str(folder), on_unit=reports.append)
    assert 1 < sum(report.seconds == 0 for report in reports) < len(reports)
    assert_close(tensors(resumed), tensors(calibrate(denoiser, config, calls)))


def test_what_one_process_raises_all_raise(tmp_path: Path) -> None:
    """Wherever the others are: at another meeting, or at the end of the work."""

    def work(rank: int) -> None:
        with processes.together():
            processes.gather([rank])
            if rank == 1:
                raise ModelError("Only here.")
            if rank == 2:
                processes.total(torch.zeros(3))

    found = in_processes(3, tmp_path, work)
    assert [(type(error), str(error)) for error in found] == [(ModelError, "Only here.")] * 3


@pytest.mark.parametrize("broken", [0, 1])
def test_where_one_process_raises_anything_else_the_others_say_so(
    broken: int, denoiser: SmallDenoiser, calls: Calls, tmp_path: Path
) -> None:
    """Also where all go on together then."""

    def work(rank: int) -> list[str]:
        def count(report: UnitReport) -> None:
            if rank == broken:
                raise ValueError("Only here.")

        with pytest.raises((ValueError, WorkerError)) as error:
            calibrate(denoiser, preset("qdiff", **NEAREST), calls, on_unit=count)
        return [str(error.value), *processes.gather([str(rank)])]

    found = in_processes(2, tmp_path, work)
    said = "Another process of the run has failed (Only here); start the run again, and it goes on."
    assert found[broken] == ["Only here.", "0", "1"] and found[1 - broken] == [said, "0", "1"]


def test_nan_in_the_calls_of_one_process_is_one_sentence_in_all(
    denoiser: SmallDenoiser, calls: Calls, tmp_path: Path
) -> None:
    calls.groups[1].rows[0][-1] = 3e38  # the first convolution overflows
    found = in_processes(2, tmp_path, lambda rank: calibrate(denoiser, preset("qdiff", **FEW), calls))
    assert {type(error) for error in found} == {NonFiniteError} and len({str(error) for error in found}) == 1


def test_other_calls_in_one_process_are_one_sentence(denoiser: SmallDenoiser, calls: Calls, tmp_path: Path) -> None:
    def work(rank: int) -> None:
        calibrate(denoiser, preset("qdiff"), calls.select(torch.arange(len(calls) - rank)))

    found = in_processes(2, tmp_path, work)
    assert all(isinstance(error, ConfigError) and "differ in their calibration_set" in str(error) for error in found)


def test_more_processes_than_calls_are_one_sentence(denoiser: SmallDenoiser, calls: Calls, tmp_path: Path) -> None:
    few = calls.select(torch.arange(2))
    found = in_processes(3, tmp_path, lambda rank: calibrate(denoiser, preset("qdiff"), few))
    assert {type(error) for error in found} == {CalibrationSetError}
    assert {str(error) for error in found} == {"2 recorded calls cannot be shared by 3 processes; start fewer."}


@pytest.mark.parametrize("whole", [1, 2, 8])
def test_shares_are_all_there_is_and_nothing_twice(whole: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for count in range(1, 6):
        monkeypatch.setattr(processes, "count", lambda count=count: count)
        for number in (whole * count, 97, 800):
            shares = []
            for rank in range(count):
                monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
                shares.append(range(number)[processes.share(number, whole)])
            assert [i for share in shares for i in share] == list(range(number))
            assert all(share and share[0] % whole == 0 for share in shares)
            assert max(map(len, shares)) < number / count + 2 * whole
