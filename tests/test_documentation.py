"""Pages of the documentation: links lead somewhere, commands and names exist, tutorials run."""

from __future__ import annotations

import ast
import importlib
import json
import re
import runpy
import shlex
import tomllib
from pathlib import Path
from types import FunctionType
from typing import Any

import click
import pytest
import torch
import yaml

import ptq_tdq
from ptq_tdq import errors
from ptq_tdq.cli.main import COMMANDS, cli
from ptq_tdq.config import Config, preset, read_config_file
from ptq_tdq.intervals import IntervalSource

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
GENERATED = {f"docs/reference/{name}.md" for name in ("api", "command-line", "choices", "artifact")}
LINK = re.compile(r"\]\((?![a-z]+:)([^)#\s]*)(?:#([^)\s]+))?\)")
CODE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)

page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@page
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for link, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        target = (page.parent / link).resolve() if link else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), anchor


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@page
def test_commands_exist_with_their_options(page: Path) -> None:
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = re.findall(r"^ {4}(ptq-tdq .+)$", text, re.MULTILINE) + re.findall(r"`(ptq-tdq [^`\n]+)`", text)
    for line in lines:
        _, name, *words = shlex.split(line, comments=True)
        if name.startswith("-") or name == "COMMAND":
            continue
        assert name in COMMANDS, line
        command = cli.get_command(click.Context(cli), name)
        assert command is not None
        known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
        assert {word for word in words if word.startswith("--")} <= known, line


def test_the_tutorial_of_a_module_and_the_interval_source_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(IntervalSource, "registry", dict(IntervalSource.registry))
    monkeypatch.setattr("ptq_tdq.processor.has_bfloat16", lambda: False)  # so little is learned here
    torch.manual_seed(0)
    names: dict[str, Any] = {"__name__": "tutorial"}
    for name in ("tutorial/own-module", "how-to/interval-source"):
        for block in CODE.findall((ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")):
            exec(compile(block, name, "exec"), names)
    scales = [table.scale for table in names["tables"].values()]
    assert all(bool((scale > 0).all()) for scale in scales)
    assert any(bool((scale != scale[0]).any()) for scale in scales)  # log s is a line in t
    for scale in scales:
        slope = scale.double().log().diff()
        assert (slope - slope.mean()).abs().max() < 1e-5


def test_files_of_choices_on_the_pages_are_read(tmp_path: Path) -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    blocks = re.findall(r"^```toml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert blocks
    for block in blocks:
        (tmp_path / "choices.toml").write_text(block)
        choices = Config.named(read_config_file(tmp_path / "choices.toml"))
        assert preset(choices.pop("preset"), **choices) != Config()


def test_every_page_is_in_the_contents() -> None:
    contents = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    listed = set(re.findall(r"[\w/-]+\.md", json.dumps(contents)))
    written = {str(page.relative_to(ROOT / "docs")) for page in PAGES if ROOT / "docs" in page.parents}
    assert listed == written | {name.removeprefix("docs/") for name in GENERATED} | {"index.md"}


def test_the_readme_is_short_and_shows_the_committed_results() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.encode()) <= 10_000
    families = json.loads((ROOT / "benchmarks/results/families.json").read_text(encoding="utf-8"))
    summary = runpy.run_path(str(ROOT / "benchmarks/families.py"))["summary"]
    shown = text.split("<!-- families -->")[1].split("<!-- end of families -->")[0]
    assert shown.strip() == summary(families)


def test_one_version_is_named_everywhere() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text()


def public_modules() -> list[str]:
    """The modules that ARCHITECTURE.md names as public."""
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8").split("\n## Public\n")[1].split("\n## ")[0]
    return re.findall(r"`(ptq_tdq[\w.]*)`", text)


@pytest.mark.parametrize("name", public_modules())
def test_public_names_are_listed_once_and_documented(name: str) -> None:
    module = importlib.import_module(name)
    assert sorted(set(module.__all__)) == module.__all__ and set(module.__all__) <= set(dir(module))
    for each in module.__all__:
        found = getattr(module, each)
        if isinstance(found, type | FunctionType):
            assert found.__name__ == each and found.__doc__ and found.__module__.startswith("ptq_tdq.")


def test_every_error_is_public() -> None:
    classes = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}
    assert classes == set(errors.__all__)


@pytest.mark.parametrize("page", [*PAGES, *sorted((ROOT / "examples").glob("*.py"))], ids=lambda page: page.name)
def test_code_uses_public_names_alone(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for block in [text] if page.suffix == ".py" else CODE.findall(text):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ptq_tdq"):
                assert node.module in public_modules()
                assert {name.name for name in node.names} <= set(importlib.import_module(str(node.module)).__all__)
            if isinstance(node, ast.Import):
                assert all(n.name in public_modules() for n in node.names if n.name.startswith("ptq_tdq"))
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "ptq_tdq":
                assert node.attr in ptq_tdq.__all__


def test_an_underscore_stays_inside_its_file() -> None:
    for file in (path for folder in ("ptq_tdq", "cli", "calib_data") for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ptq_tdq"):
                assert not [name.name for name in node.names if name.name.startswith("_")], file
