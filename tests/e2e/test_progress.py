"""Bars on a terminal: one at a time, and none outlives its run."""

from __future__ import annotations

import re

import click
import pytest
import torch
from torch import nn

from ptq_tdq.cli.progress import Progress
from ptq_tdq.errors import printable

HIDE, SHOW, UP = "\x1b[?25l", "\x1b[?25h", re.compile(r"\x1b\[\d*A")


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")  # as rich asks; stderr is captured
    monkeypatch.setenv("TERM", "xterm")


@pytest.mark.usefixtures("terminal")
def test_a_run_that_is_stopped_gives_the_cursor_back(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyboardInterrupt), click.Context(click.Command("run")):
        Progress(quiet=False, verbose=False).counting("Sampling", 1, 3)
        raise KeyboardInterrupt
    shown = capsys.readouterr().err
    assert HIDE in shown and shown.rfind(SHOW) > shown.rfind(HIDE) and "1/3" in shown


@pytest.mark.usefixtures("terminal")
def test_a_bar_is_one_line_that_any_notebook_can_redraw(capsys: pytest.CaptureFixture[str]) -> None:
    say, layer = Progress(quiet=False, verbose=False), nn.Linear(1, 1)
    for done in (1, 2):
        say.counting("Sampling", done, 2)
    with say.calls("Measuring", 2, layer):
        for _ in range(3):  # one more than was expected
            layer(torch.zeros(1))
    shown = capsys.readouterr().err
    assert shown.count(HIDE) == shown.count(SHOW) == 2 and not UP.search(shown)
    assert "2/2" in shown[: shown.index("Measuring")] and shown.rindex("2/2") > shown.rindex("Measuring")
    layer(torch.zeros(1))
    assert capsys.readouterr().err == ""


def test_off_a_terminal_the_parts_are_named_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    for verbose, expected in ((False, ""), (True, "Sampling\nMeasuring\n")):
        say = Progress(quiet=False, verbose=verbose)
        say.counting("Sampling", 1, 2)
        say.counting("Sampling", 2, 2)
        with say.calls("Measuring", 2):
            pass
        assert capsys.readouterr().err == expected


@pytest.mark.usefixtures("terminal")
@pytest.mark.parametrize("text", ["\x1b]0;PWNED\x07\x1b[2Jx", "[/]"])
def test_a_terminal_obeys_nothing_that_is_told(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    say = Progress(quiet=False, verbose=True)
    for tell in (say.notice, say.line, lambda name: say.counting(name, 1, 2)):
        tell(text)
        say.stop()
        shown = capsys.readouterr().err
        assert printable(text) in shown and "\x07" not in shown and "\x1b[2J" not in shown
