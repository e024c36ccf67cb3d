"""What an artifact says on a terminal: its names, and nothing that a terminal or a drawing library would obey."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from recorded import calls_of
from torch import Tensor, nn

from ptq_tdq import calibrate, preset
from ptq_tdq.cli.inspect import inspect_command
from ptq_tdq.errors import printable


class Odd(nn.Module):
    """One layer of any name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.layers = nn.ModuleDict()
        self.layers._modules[name] = nn.Linear(4, 4)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        (layer,) = self.layers.values()
        result: Tensor = layer(sample) + timestep[:, None] / 1000
        return result


def written(name: str, folder: Path) -> str:
    """The folder of an artifact of :class:`Odd`."""
    calls = calls_of(Odd(name), torch.randn(2, 4), torch.tensor([900.0, 1.0]), num_train_timesteps=1000)
    config = preset("default", scheme="W8A8", method="static", rounding="nearest", activation_iterations=0)
    calibrate(Odd(name), config, calls).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("[/]", "[/]"),
        ("[red]bold[/red]", "[red]bold[/red]"),
        ("\x1b]0;PWNED\x07\x1b[2J", r"\x1b]0;PWNED\x07\x1b[2J"),
    ],
)
def test_names_are_shown_as_they_are_and_without_what_a_terminal_obeys(name: str, shown: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(inspect_command, [written(name, tmp_path / "out")], catch_exceptions=False)
    assert shown in result.stdout and "\x1b" not in result.stdout


def test_plain_data_is_printable_at_any_depth() -> None:
    assert printable({"a\n": ["é\x9b", 1, None, {"x": "\ud800"}]}) == {r"a\n": ["é\\x9b", 1, None, {"x": r"\ud800"}]}
