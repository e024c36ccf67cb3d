"""The file of a calibration set: it gives the set back, and nothing else passes for one."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ptq_tdq import Calls, record
from ptq_tdq.errors import CalibrationSetError, OutputError
from ptq_tdq.timeaxis import TimeAxis


class Net(nn.Module):
    def forward(self, x: Any, timestep: Tensor, more: Any = None, text: Any = None) -> Tensor:
        return timestep


def made(**changes: Any) -> Calls:
    torch.manual_seed(0)
    model = Net()
    with record(model) as calls:
        for t in (999.0, 1.0):
            more = {"mask": torch.rand(2, 3) > 0.5, "half": torch.rand(2, 2).half(), "size": (64, 2.5), "on": True}
            model(torch.randn(2, 4), torch.full((2,), t), {**more, **changes}, torch.arange(7))
        model([torch.randn(2), torch.randn(3)], torch.tensor([5.0, 5.0]))
    calls.recipe = {"steps": 3}
    return calls


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made().save(tmp_path / "calls")
    return tmp_path / "calls"


def test_a_set_is_saved_and_loaded_whole(path: Path, tmp_path: Path) -> None:
    calls, loaded = made(), Calls.load(path)
    assert loaded.sha256 == calls.sha256 and loaded.recipe == calls.recipe and loaded.axis == calls.axis
    assert torch.equal(loaded.t, calls.t) and torch.equal(loaded.trajectory, calls.trajectory)
    for chunk in calls.chunks(2):
        ours, theirs = calls.inputs(chunk), loaded.inputs(chunk)
        assert ours.keys() == theirs.keys()
        flat = [torch.utils._pytree.tree_flatten(arguments) for arguments in (ours, theirs)]
        assert str(flat[0][1]) == str(flat[1][1])
        for a, b in zip(flat[0][0], flat[1][0], strict=True):
            assert type(a) is type(b)
            assert (a.dtype == b.dtype and torch.equal(a, b)) if isinstance(a, Tensor) else a == b
    loaded.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


class Size(NamedTuple):
    height: int
    noise: Tensor


def test_items_of_a_tuple_keep_their_names(tmp_path: Path) -> None:
    calls = made(size=Size(3, torch.ones(2, 1)))
    calls.save(tmp_path / "calls")
    loaded = Calls.load(tmp_path / "calls")
    size = loaded.inputs(slice(0, 2))["more"]["size"]
    assert size.height == 3 and torch.equal(size.noise, torch.ones(2, 1)) and type(size).__name__ == "Size"
    assert loaded.sha256 == calls.sha256 and len(Calls.join([loaded, loaded], loaded.axis).groups) == len(loaded.groups)


@pytest.mark.parametrize(
    "change", [{"size": (64, 2)}, {"on": False}, {"half": torch.zeros(2, 2).half()}, {"new": None}]
)
def test_each_argument_counts_in_the_hash(change: dict[str, Any]) -> None:
    assert made(**change).sha256 != made().sha256


def test_what_a_file_cannot_hold_is_named(tmp_path: Path) -> None:
    with pytest.raises(CalibrationSetError, match="an argument of type Conv1d"):
        made(other=nn.Conv1d(1, 1, 1)).save(tmp_path / "calls")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(OutputError):
        made().save(tmp_path / "file" / "calls")


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_a_truncated_file(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CalibrationSetError, match="record it again"):
        Calls.load(path)


def test_a_missing_and_a_foreign_file(path: Path, tmp_path: Path) -> None:
    with pytest.raises(CalibrationSetError, match="There is no calibration set"):
        Calls.load(tmp_path / "missing")
    save_file({"x": torch.ones(1)}, path)
    with pytest.raises(CalibrationSetError, match="is no calibration set of ptq-tdq"):
        Calls.load(path)


def test_one_altered_value(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(CalibrationSetError, match="does not match its hash"):
        Calls.load(path)


def edited(path: Path, change: Any) -> None:
    """Change the header and make the hash right again, as somebody who writes such files by other means would."""
    from ptq_tdq.calls import file

    with safe_open(path, framework="pt") as opened:
        header = json.loads(opened.metadata()["ptq_tdq_calls"])
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    del header["sha256"]
    change(header, tensors)
    path.write_bytes(file.encode(header, tensors))


@pytest.mark.parametrize(
    "change",
    [
        lambda h, t: h.pop("groups"),
        lambda h, t: h.update(groups=[{"value": 3}]),
        lambda h, t: h.update(groups=[{"dict": {"x": {"rows": "none", "dim": 0, "several": False}}}]),
        lambda h, t: h["groups"][0]["dict"]["x"].update(dim=-1),
        lambda h, t: h["groups"][0]["dict"]["x"].update(dim="0"),
        lambda h, t: h["groups"][0]["dict"].update(more={"named": {"a b": {"value": 3}}, "class": "Size"}),
        lambda h, t: h["groups"][0]["dict"].update(more={"named": ["a"], "class": "Size"}),
        lambda h, t: h["axis"].update(scale=0),
        lambda h, t: h["axis"].update(argument="other"),
        lambda h, t: t.update(trajectory=torch.zeros(1, dtype=torch.int64)),
        lambda h, t: t.update({"0.0": torch.zeros(1, 4)}),
        lambda h, t: h.update(recipe=3),
        lambda h, t: h["groups"][0]["dict"].update(timestep={"each": ["0.0"] * 4}),
    ],
)
def test_a_header_that_nobody_wrote(path: Path, change: Any) -> None:
    edited(path, change)
    with pytest.raises(CalibrationSetError, match="is no calibration set of ptq-tdq"):
        Calls.load(path)


def test_groups_that_name_the_same_rows_take_no_memory(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edited(path, lambda h, t: h.update(groups=h["groups"][:1] * 400))
    seen: list[int] = []

    def counted(axis: TimeAxis, value: Tensor) -> Tensor:
        seen.append(len(value))
        return value

    monkeypatch.setattr(TimeAxis, "t", counted)
    with pytest.raises(CalibrationSetError, match="is no calibration set of ptq-tdq"):
        Calls.load(path)
    assert sum(seen) <= len(made())


def test_too_little_memory_is_one_sentence(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> str:
        raise MemoryError

    monkeypatch.setattr("ptq_tdq.calls.file.digest", full)
    with pytest.raises(CalibrationSetError, match="more memory than there is"):
        Calls.load(path)


def test_a_pipe_and_a_file_far_larger_than_its_tensors_are_not_read(path: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CalibrationSetError, match="it is not a regular file"):
        Calls.load(tmp_path / "pipe")
    with path.open("ab") as file:
        file.truncate(3 << 30)
    with pytest.raises(CalibrationSetError, match="not as long as its header says"):
        Calls.load(path)
