"""What mkdocs shows beside the pages of this folder: files of the repository that they link to, and generated pages.

A link that leaves this folder (``../CHANGELOG.md``) leads to a copy of that file on the site, under ``repository/``,
and so on from there; the home page is the repository's README. Command line, choices and artifact format are written
from click, the records of choices, ``ARCHITECTURE.md`` and the JSON Schema, never by hand.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from inspect import cleandoc
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any

import click
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from ptq_tdq.artifacts import schema
from ptq_tdq.choices import Choices, described, groups, shown
from ptq_tdq.cli.main import COMMANDS, cli
from ptq_tdq.config import PRESETS, Config
from ptq_tdq.finetuning import FinetuneConfig

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]+)(?=[)#])")
HOME = "README.md"
INNER = "    options:\n      heading_level: 3"
FIELDS = f"{INNER}\n      show_if_no_docstring: true\n      filters: ['!^_']"
GIVEN = (  # what public functions give or take, made by no user
    "ptq_tdq.calib_data.original.Original",
    "ptq_tdq.calib_data.original.LoadedModel",
    "ptq_tdq.recon.engine.UnitReport",
    "ptq_tdq.finetuning.train.IterationReport",
    "ptq_tdq.timeaxis.TimeAxis",
    "ptq_tdq.search.Histogram",
    "ptq_tdq.search.QParams",
)


@event_priority(100)  # before mkdocstrings looks for it
def on_config(config: MkDocsConfig) -> None:
    """Lay the package out as it is installed: mkdocstrings does not follow the mapping of pyproject.toml, nor links."""
    tree = ROOT / "build" / "docs" / "ptq_tdq"
    shutil.rmtree(tree, ignore_errors=True)
    code = shutil.ignore_patterns("__pycache__", "*.safetensors")
    for source, place in (("ptq_tdq", tree), ("cli", tree / "cli"), ("calib_data", tree / "calib_data")):
        shutil.copytree(ROOT / source, place, ignore=code)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages and every file of the repository that a page leads to."""
    pages = {"command-line": command_line(), "choices": choices(), "artifact": artifact(), "api": api()}
    for name, text in pages.items():
        files.append(File.generated(config, f"reference/{name}.md", content=text))
    waiting = [HOME, *(f"docs/{file.src_uri}" for file in files.documentation_pages())]
    seen = set(waiting)
    while waiting:
        source = waiting.pop()
        name = site_path(source)
        file = files.src_uris.get(name) or File.generated(config, name, content=(ROOT / source).read_bytes())
        if name not in files.src_uris:
            files.append(file)
        if source.endswith(".md"):
            found = {target(source, link) for link in LINK.findall(file.content_string)}
            waiting += sorted(found - seen)
            seen |= found
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links lead to the copies."""
    here = page.file.src_uri
    copied = here.startswith("repository/")
    source = HOME if here == "index.md" else here.removeprefix("repository/") if copied else f"docs/{here}"

    def moved(match: re.Match[str]) -> str:
        return os.path.relpath(site_path(target(source, match[1])), PurePosixPath(here).parent)

    return LINK.sub(moved, markdown)


def target(source: str, link: str) -> str:
    """The file of the repository that a link in ``source`` names."""
    path = os.path.normpath(PurePosixPath(source).parent / link)
    return f"{path}/README.md" if (ROOT / path).is_dir() else path


def site_path(source: str) -> str:
    """Where a file of the repository is on the site."""
    if source == HOME:
        return "index.md"
    return source.removeprefix("docs/") if source.startswith("docs/") else f"repository/{source}"


def command_line() -> str:
    """Every command with its arguments and options, from click."""
    parts = [
        "# Command line",
        "`ptq-tdq COMMAND --help` prints the same. Exit codes: 0, 1 for a failure, 2 for a wrong request, 130 for "
        "Ctrl-C, 143 for SIGTERM, 129 for SIGHUP. Completion in bash, and likewise in zsh and fish:",
        '    eval "$(_PTQ_TDQ_COMPLETE=bash_source ptq-tdq)"',
    ]
    context = click.Context(cli, info_name="ptq-tdq")
    for name in COMMANDS:
        command = cli.get_command(context, name)
        assert command is not None
        inner = click.Context(command, info_name=name, parent=context)
        usage = " ".join(command.collect_usage_pieces(inner))
        records = [record for p in command.params if (record := p.get_help_record(inner)) is not None]
        rows = [(f"`{flags}`", text.replace("[", r"\[").replace("|", r"\|")) for flags, text in records]
        prose = "\n\n".join(" ".join(part.split()) for part in (command.help or "").split("\n\n"))
        parts += [f"## {name}", f"    ptq-tdq {name} {usage}", prose, table(("option", "what it does"), rows)]
    return "\n\n".join(parts) + "\n"


def choices() -> str:
    """Every choice by group, with its meaning, unit, source and its value in each preset, from the records."""
    text = (
        "Each is changed by `--set name=value`, in a file (`--config choices.toml`, with a table for each group) or in "
        'Python (`ptq_tdq.preset("default", name=value)`), is read as `config.group.name` and saved with the result. '
        "[How to choose](../how-to/choose.md) names those that matter; `ptq-tdq choices` prints them all."
    )
    parts = ["# Choices", text, "## Calibration", one_group(Config, "", PRESETS)]
    for name, group in groups(Config).items():
        parts += [f"### {name}", cleandoc(group.__doc__ or ""), one_group(Config, name, PRESETS)]
    parts += [
        "## Fine-tuning",
        "Group `intervals` is that of calibration.",
        one_group(FinetuneConfig, "", {"default": {}}),
    ]
    return "\n\n".join(parts) + "\n"


def one_group(record: type[Choices], group: str, presets: Mapping[str, Mapping[str, Any]]) -> str:
    """The table of a group; a preset that says nothing of a choice has the default."""
    rows = []
    for name, about in described(record).items():
        if about.group == group and name != "preset":
            listed = [f"`{value}`: {text}" for value, text in about.alternatives.items()] or [about.values]
            meaning = "<br>".join(filter(None, (about.meaning, *listed, about.source and f"({about.source})")))
            values = [shown(choices.get(name, about.default)) for choices in presets.values()]
            rows.append((f"`{name}`", meaning.replace("|", r"\|"), *values))
    return table(("choice", "what it means", *presets), rows)


def artifact() -> str:
    """The artifact format, from ARCHITECTURE.md and the schema."""
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    directory, lookup = (text.split(f"\n## {name}\n")[1].split("\n## ")[0] for name in ("Artifact directory", "Lookup"))
    document = json.dumps(schema(), indent=2)
    parts = ("# Artifacts", directory, "## Lookup", lookup, "## ptq_tdq_config.json", f"```json\n{document}\n```")
    return "\n\n".join(part.strip() for part in parts) + "\n"


def api() -> str:
    """The public names of each public module, where they live, and what they give; errors have a page of their own."""
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8").split("\n## Public\n")[1].split("\n## ")[0]
    parts = ["# Python", text.strip()]
    for module in map(import_module, re.findall(r"`(ptq_tdq[\w.]*)`", text)):
        if module.__name__ != "ptq_tdq.errors":
            parts += [f"## {module.__name__}", *(f"::: {home(module, name)}\n{INNER}" for name in module.__all__)]
    parts += ["## What these give and take", *(f"::: {name}\n{FIELDS}" for name in GIVEN)]
    return "\n\n".join([*parts, ""])


def home(module: ModuleType, name: str) -> str:
    """Where a public name is defined; a constant has no place but the module."""
    value = getattr(module, name)
    defined = getattr(value, "__qualname__", None) == name and str(value.__module__).startswith("ptq_tdq.")
    return f"{value.__module__}.{name}" if defined else f"{module.__name__}.{name}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(' '.join(cell.split()) for cell in row)} |" for row in lines)
