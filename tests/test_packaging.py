"""The explicit package list of pyproject.toml against the tree, and what an installation provides."""

from __future__ import annotations

import importlib
from importlib.metadata import entry_points, metadata
from pathlib import Path
from typing import Any

import pytest

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_folder_with_code_is_listed_and_every_listed_folder_exists(project: dict[str, Any]) -> None:
    setuptools = project["tool"]["setuptools"]
    mapping = setuptools["package-dir"]
    in_tree = set()
    for package, folder in mapping.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            parts = init.parent.relative_to(ROOT / folder).parts
            in_tree.add(".".join((package, *parts)))
    assert in_tree == set(setuptools["packages"])


def test_every_listed_package_imports(project: dict[str, Any]) -> None:
    for package in project["tool"]["setuptools"]["packages"]:
        importlib.import_module(package)


def test_the_top_level_folders_do_not_become_top_level_packages() -> None:
    for name in ("cli", "calib_data"):
        module = importlib.import_module(f"ptq_tdq.{name}")
        assert module.__name__ == f"ptq_tdq.{name}"


def test_the_command_is_installed_under_its_name() -> None:
    (command,) = entry_points(group="console_scripts", name="ptq-tdq")
    assert callable(command.load())


def test_the_metadata_name_the_licence() -> None:
    found = metadata("ptq-tdq")
    assert found["License-Expression"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text()


def test_every_dependency_is_a_range_and_has_a_tested_pin(project: dict[str, Any]) -> None:
    pins = {
        line.split("==")[0].strip().lower()
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line and not line.startswith("#")
    }
    # torch-fidelity needs torchvision, which no tested build of torch has beside it
    extras = [v for k, v in project["project"]["optional-dependencies"].items() if k != "fidelity"]
    for requirement in [*project["project"]["dependencies"], *(r for extra in extras for r in extra)]:
        if requirement.startswith("ptq-tdq["):
            continue
        assert ">=" in requirement
        assert requirement.split(">=")[0].lower() in pins
