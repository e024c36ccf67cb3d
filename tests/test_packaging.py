"""The explicit package list of pyproject.toml against the tree, and what an installation provides."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from importlib.metadata import entry_points, metadata
from pathlib import Path
from typing import Any

import numpy
import pytest

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


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made of the sdist of this tree, unpacked elsewhere."""
    folder = tmp_path_factory.mktemp("built")
    for name in ("ptq_tdq", "cli", "calib_data"):
        shutil.copytree(ROOT / name, folder / "tree" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, folder / "tree")
    with tarfile.open(build("sdist", folder / "tree", folder)) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return build("wheel", unpacked, folder)


def build(kind: str, source: Path, target: Path) -> Path:
    code = f"import setuptools.build_meta as b; b.build_{kind}({str(target)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    (found,) = target.glob({"sdist": "*.tar.gz", "wheel": "*.whl"}[kind])
    return found


def test_the_wheel_of_the_sdist_has_all_files_of_the_package(wheel: Path, project: dict[str, Any]) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    for package, folder in project["tool"]["setuptools"]["package-dir"].items():
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                packed.remove(str(Path(package.replace(".", "/")) / path.relative_to(ROOT / folder)))
    assert not packed


def test_the_wheel_runs_in_an_environment_that_has_its_dependencies_alone(
    wheel: Path, project: dict[str, Any], tmp_path: Path
) -> None:
    venv.create(tmp_path / "env", symlinks=True)
    python = tmp_path / "env" / "bin" / "python"
    (packages,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    # a path file of a path file is not read, and so the editable installation of this tree is not seen
    (packages / "dependencies.pth").write_text(str(Path(numpy.__file__).parents[1]))
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--no-compile", str(wheel)], check=True, capture_output=True)
    code = (
        "import runpy, sys, ptq_tdq; ptq_tdq.load_model('reference-dit'); print(ptq_tdq.__file__, flush=True); "
        "sys.argv = ['ptq-tdq', 'doctor', '--json']; runpy.run_path(sys.prefix + '/bin/ptq-tdq', run_name='__main__')"
    )
    done = subprocess.run([str(python), "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True)
    place, _, found = done.stdout.partition("\n")
    assert json.loads(found)["versions"]["ptq-tdq"] == project["project"]["version"]
    assert Path(place).is_relative_to(packages)
