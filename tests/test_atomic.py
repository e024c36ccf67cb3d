from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from ptq_tdq.atomic import (
    Contents,
    FileKind,
    check_file_target,
    check_space,
    check_target,
    publish_directory,
    write_atomic,
    write_file,
)
from ptq_tdq.errors import OutputError


def _write(path: Path) -> None:
    write_atomic(path, b"new")


def _publish(path: Path) -> None:
    with publish_directory(path) as folder:
        (folder / "file").write_bytes(b"new")


ANYTHING = Contents("a test", ("*",))
both = pytest.mark.parametrize("write", [_write, _publish])


@both
def test_parents_are_made_and_nothing_else_is_left(tmp_path: Path, write) -> None:  # type: ignore[no-untyped-def]
    write(tmp_path / "a" / "b")
    assert os.listdir(tmp_path / "a") == ["b"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o000, 0o644)])
def test_mode_is_0644_less_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        write_atomic(tmp_path / "file", b"")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == mode


def test_a_file_is_replaced_through_its_link(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "link").symlink_to("file")
    write_atomic(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_bytes() == b"new"


def test_devices_and_folders_are_no_place_for_a_file(tmp_path: Path) -> None:
    for path in (Path(os.devnull), tmp_path):
        with pytest.raises(OutputError, match="not a regular file"):
            write_atomic(path, b"new")


@both
def test_a_file_as_parent(tmp_path: Path, write) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(OutputError, match="a part of its path is a file"):
        write(tmp_path / "file" / "out")
    assert (tmp_path / "file").read_bytes() == b"old"


@both
@pytest.mark.skipif(os.geteuid() == 0, reason="modes do not bind root; test_refusals_by_the_system covers EACCES")
def test_a_folder_without_write_permission(tmp_path: Path, write) -> None:  # type: ignore[no-untyped-def]
    tmp_path.chmod(0o555)
    with pytest.raises(OutputError, match="choose a folder that you may write to"):
        write(tmp_path / "out")


@both
@pytest.mark.parametrize(
    ("code", "advice"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EDQUOT, "free some space"),
        (errno.EACCES, "may write to"),
        (errno.EROFS, "may write to"),
        (errno.EIO, "choose another path"),
    ],
)
def test_refusals_by_the_system(tmp_path: Path, monkeypatch, write, code: int, advice: str) -> None:  # type: ignore[no-untyped-def]
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OutputError, match=advice) as caught:
        write(tmp_path / "out")
    assert os.strerror(code) in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path) -> None:
    """A real refusal by the kernel in the middle of a write: the process may not grow files beyond 64 KiB."""
    program = """
import resource, sys
from ptq_tdq.atomic import Contents, publish_directory, write_atomic, write_file
from ptq_tdq.errors import OutputError
from pathlib import Path
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
root, errors = Path(sys.argv[1]), []
try:
    write_atomic(root / "file", bytes(100_000))
except OutputError as error:
    errors.append(error)
try:
    with publish_directory(root / "folder", Contents("a test", ("*",))) as folder:
        write_file(folder / "small", b"fits")
        write_file(folder / "large", bytes(100_000))
except OutputError as error:
    errors.append(error)
print(*errors, sep="\\n")
"""
    (tmp_path / "folder").mkdir()
    for name in ("file", "folder/large"):
        (tmp_path / name).write_bytes(b"old")
    run = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    assert run.stdout.count("free some space or choose another folder") == 2
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]
    assert os.listdir(tmp_path / "folder") == ["large"]
    assert all((tmp_path / name).read_bytes() == b"old" for name in ("file", "folder/large"))


def test_an_empty_folder_may_be_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    _publish(tmp_path / "out")
    assert (tmp_path / "out" / "file").read_bytes() == b"new"


def test_a_filled_folder_is_refused(tmp_path: Path) -> None:
    _publish(tmp_path / "out")
    with pytest.raises(OutputError, match="choose another folder, empty it, or ask to overwrite it"):
        _publish(tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"]


def test_a_folder_that_is_filled_meanwhile_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="ask to overwrite it"), publish_directory(tmp_path / "out"):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").touch()
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(tmp_path / "out") == ["theirs"]


def test_overwrite_replaces_everything_but_only_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").touch()
    with publish_directory(target, ANYTHING) as folder:
        (folder / "new").touch()
        assert os.listdir(target) == ["old"]
    assert os.listdir(target) == ["new"]
    assert os.listdir(tmp_path) == ["out"]


def test_overwrite_never_removes_what_is_of_another_kind(tmp_path: Path) -> None:
    target, ours = tmp_path / "out", Contents("a report", ("page.html", "t*.onnx"))
    for name in ("t0999.onnx", "page.html"):
        target.mkdir(exist_ok=True)
        (target / name).touch()
    (target / "thesis.tex").write_text("years of work")
    with (
        pytest.raises(OutputError, match=r"holds 'thesis\.tex', which is no part of a report; move it away"),
        publish_directory(target, ours),
    ):
        pass
    assert (target / "thesis.tex").read_text() == "years of work"
    (target / "thesis.tex").unlink()
    with publish_directory(target, ours) as folder:
        (folder / "page.html").touch()
    assert os.listdir(target) == ["page.html"]


def test_an_error_in_the_body_changes_nothing(tmp_path: Path) -> None:
    _publish(tmp_path / "out")
    with pytest.raises(KeyboardInterrupt), publish_directory(tmp_path / "out", ANYTHING) as folder:
        (folder / "half").touch()
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(tmp_path / "out") == ["file"]


def test_a_failing_swap_brings_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _publish(tmp_path / "out")
    rename = os.rename

    def refuse_second(source: Path, target: Path, calls: list[Path] = []) -> None:  # noqa: B006
        calls.append(source)
        if len(calls) == 2:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse_second)
    with pytest.raises(OutputError), publish_directory(tmp_path / "out", ANYTHING):
        pass
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(tmp_path / "out") == ["file"]


def test_files_and_mount_points_cannot_become_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(OutputError, match="is a file, not a folder"):
        _publish(tmp_path / "file")
    with pytest.raises(OutputError, match="mount point"), publish_directory("/", ANYTHING):
        pass


def _killed(write: Callable[[], object], last: int) -> bool:
    """Run ``write`` in a process that is killed when it touches hidden files for the ``last`` time; whether it was."""
    seen = 0

    def watch(event: str, args: tuple[object, ...]) -> None:
        nonlocal seen
        if event in ("open", "os.mkdir", "os.rename", "os.rmdir") and any("ptq-tdq" in str(arg) for arg in args):
            seen += 1
            if seen == last:
                os.kill(os.getpid(), signal.SIGKILL)

    if not (process := os.fork()):
        with suppress(BaseException):  # nothing of this process comes back into the test
            sys.addaudithook(watch)
            write()
            os._exit(0)
        os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code != 0


def _overwrite(target: Path) -> None:
    with publish_directory(target, ANYTHING) as folder:
        for name in ("a", "b"):
            write_file(folder / name, b"new")


def _found(target: Path) -> list[tuple[str, bytes]]:
    files = [target] if target.is_file() else sorted(target.iterdir())
    return [(path.name, path.read_bytes()) for path in files]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_killed_at_any_moment_the_old_or_the_new_is_there_and_the_next_run_removes_the_rest(
    tmp_path: Path, kind: str
) -> None:
    new = [("out", b"new")] if kind == "file" else [("a", b"new"), ("b", b"new")]
    for last in range(1, 30):
        target = tmp_path / str(last) / "out"
        old = target if kind == "file" else target / "c"
        old.parent.mkdir(parents=True)
        old.write_bytes(b"old")
        killed = _killed(partial(_write if kind == "file" else _overwrite, target), last)
        left = [name for name in os.listdir(target.parent) if name != "out"]
        check_target(target.with_name("other"))
        assert [name for name in os.listdir(target.parent) if name != "out"] == left, "they are not of that target"
        if kind == "folder":
            check_target(target, ANYTHING)
            assert _found(target) in ([("c", b"old")], new)
        else:
            assert _found(target) in ([("out", b"old")], new)
            _write(target)
        filled = [name for name in os.listdir(target.parent) if name != "out" and os.listdir(target.parent / name)]
        assert filled == []
        if not killed:
            break
    assert not killed and last > 4


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_disk_that_is_full_at_any_moment_keeps_the_old_or_has_the_new(tmp_path: Path, kind: str) -> None:
    write, new = (_write, [("out", b"new")]) if kind == "file" else (_overwrite, [("a", b"new"), ("b", b"new")])
    refused = 0
    for last in range(1, 30):
        target = tmp_path / str(last) / "out"
        old = target if kind == "file" else target / "c"
        old.parent.mkdir(parents=True)
        old.write_bytes(b"old")
        with pytest.MonkeyPatch.context() as patch:
            left = _full_from(last, patch)
            with suppress(OutputError):
                write(target)
        found = _found(target)
        assert found == new or (found == [(old.name, b"old")] and not left(0))
        assert os.listdir(target.parent) == ["out"]
        refused += found != new
        if left(0):
            break
    assert refused > 3 and found == new


def _full_from(last: int, patch: pytest.MonkeyPatch) -> Callable[[int], int]:
    """Refuse, once, the ``last`` call that takes room on the disk; how many are left until then."""
    room = [last]

    def take(count: int = 1) -> int:
        room[0] -= count
        return max(0, room[0])

    def refusing(call: Callable[..., object], always: bool) -> Callable[..., object]:
        def instead(*args: object, **kwargs: object) -> object:
            takes = always or (len(args) > 1 and isinstance(args[1], int) and args[1] & os.O_CREAT)
            if takes and take() == 0 and room[0] == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return call(*args, **kwargs)

        return instead

    for name in ("mkdir", "rename", "replace", "fsync", "open"):
        patch.setattr(os, name, refusing(getattr(os, name), name != "open"))
    return take


def _as_pipe(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(folder)
    os.mkfifo(folder)


def _as_link(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.symlink_to(folder.rename(folder.with_name("elsewhere")))


def _of_another_user(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)


@both
@pytest.mark.parametrize("change", [_as_pipe, _as_link, _of_another_user])
def test_what_is_only_named_like_a_writer_s_folder_is_left_alone(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Path, pytest.MonkeyPatch], None],
    write,  # type: ignore[no-untyped-def]
) -> None:
    with publish_directory(tmp_path / "out", ANYTHING) as folder:
        planted = folder.parent
    (planted / "old").mkdir(parents=True)
    (tmp_path / "out").rmdir()
    change(planted, monkeypatch)
    before = sorted(os.listdir(tmp_path))
    write(tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == sorted([*before, "out"]) and (tmp_path / "out").stat().st_size


def test_what_a_living_process_writes_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with publish_directory(tmp_path / "out", ANYTHING) as folder:
        (folder / "file").touch()
        check_target(tmp_path / "out")
        _publish(tmp_path / "out")
        assert (folder / "file").exists()


def test_two_writers_of_one_file_leave_one_of_both(tmp_path: Path) -> None:
    def write(text: bytes) -> None:
        for _ in range(30):
            write_atomic(tmp_path / "out", text * 1000)

    writers = [threading.Thread(target=write, args=(text,)) for text in (b"a", b"b")]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert (tmp_path / "out").read_bytes() in (b"a" * 1000, b"b" * 1000)
    assert os.listdir(tmp_path) == ["out"]


def test_a_file_is_replaced_by_its_own_kind_only(tmp_path: Path) -> None:
    kind = FileKind("a list", rb"list:")
    for name, content in (("own", b"list: a"), ("empty", b""), ("absent", None)):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        check_file_target(tmp_path / name, kind)
    (tmp_path / "foreign").write_bytes(b"a letter")
    (tmp_path / "link").symlink_to("foreign")
    for name in ("foreign", "link"):
        with pytest.raises(OutputError, match=f"{name}' is there and is not a list"):
            check_file_target(tmp_path / name, kind)


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_what_is_read_is_no_place_for_what_is_written(link: Callable[..., None], tmp_path: Path) -> None:
    read = tmp_path / "read"
    read.write_bytes(b"list: a")
    link(read, tmp_path / "other")
    for output, source in ((read, read), (tmp_path / "other", read), (tmp_path / "new", tmp_path / "a" / ".." / "new")):
        with pytest.raises(OutputError, match="would replace what is read from there"):
            check_file_target(output, FileKind("a list", rb"list:"), [source])


def test_what_a_run_has_written_counts_as_space_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(9000, 8000, 1000))  # type: ignore[attr-defined]
    folder = tmp_path / "out.partial"
    with pytest.raises(OutputError, match=r"about 1.46 KiB of disk, of which 0.977 KiB are free in .*; free some"):
        check_space(1500, folder)
    folder.mkdir()
    (folder / "state").write_bytes(bytes(500))
    check_space(1500, folder)
