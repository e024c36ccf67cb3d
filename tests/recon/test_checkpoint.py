"""Files of an unfinished run that are not what was written: the unit is done again and the result is the same."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ptq_tdq.calibration import calibrate
from ptq_tdq.config import preset
from ptq_tdq.errors import ResumeError
from ptq_tdq.recon import RunDirectory

FEW = {
    "scheme": "W4A8",
    "method": "dynamic-statistics",
    "module_start": "as-is",
    "activation_iterations": 1,
    "weight_iterations": 1,
    "batch_size": 4,
    "activation_range": "minmax",
    "weight_range": "minmax",
    "compute_dtype": "float32",
}


class Case:
    """A finished run's folder, its result, and the way to go on from a changed copy."""

    def __init__(self, unet: Any, calls: Any, folder: Path) -> None:
        self.unet, self.calls, self.folder = unet, calls, folder
        self.config = preset("default", **FEW)
        self.expected, notices = self.run(folder)
        assert notices == []

    def run(self, folder: Path) -> tuple[dict[str, bytes], list[str]]:
        notices: list[str] = []
        quantized = calibrate(self.unet, self.config, self.calls, run_directory=folder, on_notice=notices.append)
        quantized.save_pretrained(folder / "out")
        found = {path.name: path.read_bytes() for path in (folder / "out").iterdir()}
        shutil.rmtree(folder / "out")
        return found, notices

    def check(self, copy: Path, *damaged: str) -> None:
        """Going on in ``copy`` names these files, ends with the same bytes, and a second time with none."""
        found, notices = self.run(copy)
        assert found == self.expected
        assert [name for name in damaged if not any(name in notice for notice in notices)] == []
        assert len(notices) == len(damaged) and all("damaged" in notice for notice in notices)
        assert self.run(copy) == (self.expected, [])


@pytest.fixture(scope="module")
def case(make_unet: Any, make_calls: Any, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Tests must not change it."""
    unet = make_unet()
    return Case(unet, make_calls(unet), tmp_path_factory.mktemp("case") / "run")


@pytest.fixture
def copied(case: Case, tmp_path: Path) -> Callable[[], Path]:
    def make() -> Path:
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        return Path(shutil.copytree(case.folder, tmp_path / "copy"))

    return make


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8 % len(data)] ^= 1 << bit % 8
    path.write_bytes(bytes(data))


def test_flipped_bits_anywhere_are_found_and_done_again(case: Case, copied: Callable[[], Path]) -> None:
    generator = random.Random(0)
    for _ in range(3):
        copy = copied()
        paths = sorted(copy.glob("*-*.safetensors"))
        chosen = generator.sample(paths, 4)
        for path in chosen:
            flip(path, generator.randrange(8 * path.stat().st_size))
        case.check(copy, *(path.name for path in chosen))


def test_every_flipped_bit_of_a_small_file_is_found(tmp_path: Path) -> None:
    notices: list[str] = []
    run = RunDirectory(tmp_path, {"model": "m"}, on_notice=notices.append)
    form = {"a": (torch.float32, (2,))}
    run.write("weights", 0, {"a": torch.tensor([1.0, 2.0])}, (2.0, 1.0))
    (path,) = tmp_path.glob("weights-*")
    whole = path.read_bytes()
    for bit in range(8 * len(whole)):
        path.write_bytes(whole)
        flip(path, bit)
        found = run.read("weights", 0, form)
        if found is not None:  # a space of the header's padding, say
            assert torch.equal(found[0]["a"], torch.tensor([1.0, 2.0])) and found[1] == (2.0, 1.0)
    assert len(notices) > 0.9 * 8 * len(whole)


def test_a_file_far_larger_than_the_unit_is_not_read(tmp_path: Path) -> None:
    notices: list[str] = []
    run = RunDirectory(tmp_path, {"model": "m"}, on_notice=notices.append)
    path, size = tmp_path / "weights-0000.safetensors", 3 << 30
    header = json.dumps({"a": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(path, 8 + len(header) + size)
    assert run.read("weights", 0, {"a": (torch.float32, (2,))}) is None
    path.unlink()
    os.mkfifo(path)
    assert run.read("weights", 0, {"a": (torch.float32, (2,))}) is None
    assert len(notices) == 2


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b"[[1]]", b"null", b"5", b'"text"', b"{}", b"\xff\xfe", b"[" * 100_000, b'{"sha256": 1}']
)
def test_a_damaged_record_of_the_run_costs_no_unit(data: bytes, tmp_path: Path) -> None:
    notices: list[str] = []
    form = {"a": (torch.float32, (2,))}
    RunDirectory(tmp_path, {"model": "m"}).write("weights", 0, {"a": torch.ones(2)}, (2.0, 1.0))
    (tmp_path / "run.json").write_bytes(data)
    run = RunDirectory(tmp_path, {"model": "m"}, on_notice=notices.append)
    assert len(notices) == 1 and "run.json is damaged" in notices[0]
    assert run.read("weights", 0, form) is not None
    RunDirectory(tmp_path, {"model": "m"}, on_notice=notices.append)
    assert len(notices) == 1
    with pytest.raises(ResumeError, match="another model"):
        RunDirectory(tmp_path, {"model": "other"})


def test_every_flipped_bit_of_the_record_is_found(tmp_path: Path) -> None:
    RunDirectory(tmp_path, {"model": "m", "seed": 0})
    record = tmp_path / "run.json"
    whole = record.read_bytes()
    for bit in range(8 * len(whole)):
        record.write_bytes(whole)
        flip(record, bit)
        RunDirectory(tmp_path, {"model": "m", "seed": 0})
        assert json.loads(record.read_bytes()) == json.loads(whole)


def test_units_of_another_run_are_not_used_even_without_its_record(tmp_path: Path) -> None:
    notices: list[str] = []
    RunDirectory(tmp_path, {"seed": 0}).write("weights", 0, {"a": torch.ones(2)}, (2.0, 1.0))
    (tmp_path / "run.json").unlink()
    run = RunDirectory(tmp_path, {"seed": 1}, on_notice=notices.append)
    assert run.read("weights", 0, {"a": (torch.float32, (2,))}) is None and len(notices) == 1


def test_a_unit_under_the_name_of_another_is_not_used(tmp_path: Path) -> None:
    notices: list[str] = []
    run = RunDirectory(tmp_path, {"seed": 0}, on_notice=notices.append)
    run.write("weights", 0, {"a": torch.ones(2)}, (2.0, 1.0))
    (tmp_path / "weights-0000.safetensors").rename(tmp_path / "weights-0001.safetensors")
    assert run.read("weights", 1, {"a": (torch.float32, (2,))}) is None and len(notices) == 1


def test_truncated_empty_foreign_and_swapped_files(case: Case, copied: Callable[[], Path]) -> None:
    copy = copied()
    paths = sorted(copy.glob("*-*.safetensors"))
    paths[0].write_bytes(paths[0].read_bytes()[:-5])
    paths[1].write_bytes(b"")
    save_file({"x": torch.ones(1)}, paths[2])
    paths[3].write_bytes(paths[4].read_bytes())
    (copy / "run.json").write_text("[]")
    (copy / "letter.txt").write_text("mine")
    case.check(copy, "run.json", *(path.name for path in paths[:4]))
    assert (copy / "letter.txt").read_text() == "mine"


@pytest.mark.parametrize("change", ["shape", "dtype", "missing", "extra"])
def test_other_tensors_under_a_right_hash_are_not_used(
    change: str, case: Case, copied: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = copied()
    path = sorted(copy.glob("activations-*"))[-1]
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        losses = tuple(json.loads(file.metadata()["losses"]))
    name = next(key for key in tensors if key.endswith(".scale"))
    if change == "shape":
        tensors[name] = tensors[name][:1]
    elif change == "dtype":
        tensors[name] = tensors[name].double()
    elif change == "missing":
        del tensors[name]
    else:
        tensors["more"] = torch.ones(1)
    identity = json.loads((copy / "run.json").read_bytes())
    del identity["sha256"]
    RunDirectory(copy, identity).write("activations", int(path.stem[-4:]), tensors, losses)
    case.check(copy, path.name)


def test_a_folder_in_the_place_of_a_file_is_refused_and_kept(case: Case, copied: Callable[[], Path]) -> None:
    copy = copied()
    place = copy / "weights-0001.safetensors"
    place.unlink()
    place.mkdir()
    (place / "letter.txt").write_text("mine")
    with pytest.raises(ResumeError, match=r"weights-0001\.safetensors is a folder .* move it away"):
        case.run(copy)
    assert (place / "letter.txt").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_done_again(case: Case, copied: Callable[[], Path]) -> None:
    copy = copied()
    (copy / "weights-0001.safetensors").chmod(0)
    case.check(copy, "weights-0001.safetensors")


def test_shared_weights_are_checked_alike(case: Case, tmp_path: Path) -> None:
    runs = {"run_directory": tmp_path / "a", "weights_directory": tmp_path / "shared"}
    calibrate(case.unet, case.config, case.calls, **runs)
    damaged = tmp_path / "shared" / "weights-0002.safetensors"
    flip(damaged, 8 * damaged.stat().st_size - 1)
    notices: list[str] = []
    runs["run_directory"] = tmp_path / "b"
    quantized = calibrate(case.unet, case.config, case.calls, **runs, on_notice=notices.append)
    quantized.save_pretrained(tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == case.expected
    assert len(notices) == 1 and str(damaged) in notices[0]


def test_without_a_callback_a_notice_is_logged(
    case: Case, copied: Callable[[], Path], caplog: pytest.LogCaptureFixture
) -> None:
    copy = copied()
    (copy / "weights-0000.safetensors").write_bytes(b"")
    calibrate(case.unet, case.config, case.calls, run_directory=copy)
    assert "weights-0000.safetensors is damaged; what it held is done again." in caplog.text
