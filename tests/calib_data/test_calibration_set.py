from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ptq_tdq.calib_data import CalibrationSet
from ptq_tdq.errors import CalibrationSetError, OutputError


def make_set(labels: bool = True, seed: int = 0) -> CalibrationSet:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(6, 3, 4, 4, generator=generator)
    t = torch.tensor([999.0, 999.0, 413.25, 413.25, 0.0, 0.0])
    return CalibrationSet(x, t, torch.arange(6) % 3 if labels else None, {"seed": seed, "steps": [0, 2]})


@pytest.mark.parametrize("labels", [True, False])
def test_a_saved_set_comes_back_bit_for_bit(tmp_path: Path, labels: bool) -> None:
    original = make_set(labels)
    original.save(tmp_path / "set.safetensors")
    loaded = CalibrationSet.load(tmp_path / "set.safetensors")
    assert torch.equal(loaded.x, original.x)
    assert torch.equal(loaded.t, original.t)
    if labels:
        assert loaded.class_labels is not None
        assert torch.equal(loaded.class_labels, torch.arange(6) % 3)
    else:
        assert loaded.class_labels is None
    assert loaded.recipe == original.recipe
    assert loaded.sha256 == original.sha256
    assert len(loaded) == 6


def test_equal_sets_give_equal_bytes_and_other_sets_do_not(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make_set(seed=seed).save(tmp_path / name)
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a == b != c


def test_the_hash_covers_every_field() -> None:
    base = make_set()
    shifted = CalibrationSet(base.x, base.t + 1, base.class_labels, base.recipe)
    unlabelled = CalibrationSet(base.x, base.t, None, base.recipe)
    other_recipe = CalibrationSet(base.x, base.t, base.class_labels, {"seed": 9})
    nudged = CalibrationSet(base.x.nextafter(torch.tensor(9.0)), base.t, base.class_labels, base.recipe)
    assert len({s.sha256 for s in (base, shifted, unlabelled, other_recipe, nudged)}) == 5


def test_the_file_is_readable_by_others_and_nothing_else_is_left(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        make_set().save(tmp_path / "new" / "set.safetensors")
    finally:
        os.umask(before)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["set.safetensors"]
    assert stat.S_IMODE((tmp_path / "new" / "set.safetensors").stat().st_mode) == 0o644


def test_every_flipped_byte_is_detected(tmp_path: Path) -> None:
    path = tmp_path / "set.safetensors"
    make_set().save(path)
    intact = path.read_bytes()
    for position in [*range(0, len(intact), 7), len(intact) - 1]:
        path.write_bytes(intact[:position] + bytes([intact[position] ^ 0x20]) + intact[position + 1 :])
        try:
            loaded = CalibrationSet.load(path)
        except CalibrationSetError:
            continue
        # a space in the header's padding may become another blank; the content must then be the same
        assert loaded.sha256 == make_set().sha256, f"byte {position}"


@pytest.mark.parametrize("length", [0, 4, 8, 100, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, length: int) -> None:
    path = tmp_path / "set.safetensors"
    make_set().save(path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(CalibrationSetError, match="collect it again"):
        CalibrationSet.load(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationSetError, match="There is no calibration set"):
        CalibrationSet.load(tmp_path / "absent.safetensors")
    with pytest.raises(CalibrationSetError):
        CalibrationSet.load(tmp_path)


def test_foreign_safetensors_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "foreign.safetensors"
    save_file({"x": torch.zeros(1, 3, 4, 4), "t": torch.zeros(1)}, path)
    with pytest.raises(CalibrationSetError, match="no calibration set of ptq-tdq"):
        CalibrationSet.load(path)


def test_added_tensors_are_refused(tmp_path: Path) -> None:
    original = make_set(labels=False)
    metadata = json.dumps({"recipe": original.recipe, "sha256": original.sha256})
    tensors = {"x": original.x, "t": original.t, "more": torch.zeros(1)}
    save_file(tensors, tmp_path / "set", metadata={"ptq_tdq_calibration_set": metadata})
    with pytest.raises(CalibrationSetError, match="altered"):
        CalibrationSet.load(tmp_path / "set")


def test_nan_names_its_time_step() -> None:
    good = make_set()
    x = good.x.clone()
    x[2, 0, 0, 0] = torch.nan
    with pytest.raises(CalibrationSetError, match=r"t = 413\.25"):
        CalibrationSet(x, good.t, good.class_labels)


@pytest.mark.parametrize(
    ("x", "t", "labels", "said"),
    [
        (torch.zeros(0, 3, 4, 4), torch.zeros(0), None, "is empty"),
        (torch.zeros(2, 3, 4, 4), torch.zeros(3), None, r"t float32 \[3\]"),
        (torch.zeros(2, 3, 4), torch.zeros(2), None, r"x float32 \[2, 3, 4\]"),
        (torch.zeros(2, 3, 4, 4), torch.zeros(2, dtype=torch.int64), None, r"t int64 \[2\]"),
        (torch.zeros(2, 3, 4, 4), torch.zeros(2), torch.zeros(2), r"class_labels float32 \[2\]"),
        (torch.zeros(2, 3, 4, 4), torch.tensor([0.0, torch.inf]), None, "time step that is NaN or Inf"),
    ],
)
def test_an_ill_formed_set_says_what_is_wrong(x: Tensor, t: Tensor, labels: Tensor | None, said: str) -> None:
    with pytest.raises(CalibrationSetError, match=said):
        CalibrationSet(x, t, labels)


def test_a_path_that_cannot_be_written_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        make_set().save(tmp_path / "file" / "set.safetensors")
