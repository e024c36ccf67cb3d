"""``doctor``: facts of this machine, as other sources have them."""

from __future__ import annotations

import importlib.util
import json
import shutil
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ptq_tdq.cli.doctor import EXTRAS

ROOT = Path(__file__).parents[2]


def test_every_extra_for_users_is_explained() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(EXTRAS) == set(extras) - {"dev", "bench", "docs"}


def test_the_facts_are_those_of_the_interpreter(cli: Any) -> None:
    found = json.loads(cli("doctor", "--json").out)
    assert found["versions"] == {name: version(name) for name in ("ptq-tdq", "torch", "diffusers")}
    assert (found["missing"]["metrics"] == []) == (importlib.util.find_spec("torchmetrics") is not None)
    assert (found["missing"]["fidelity"] == []) == (importlib.util.find_spec("torch_fidelity") is not None)
    assert found["devices"][0] == "cpu" and found["cores"] >= 1
    assert found["native"] or shutil.which(found["compiler"].split()[0])


def test_it_reads_like_text(cli: Any) -> None:
    shown = cli("doctor")
    assert shown.code == 0 and "Processor:" in shown.out
    assert all(name in shown.out for name in EXTRAS)
