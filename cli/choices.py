"""``ptq-tdq choices``: what may be chosen, and what it means."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from inspect import cleandoc
from typing import Any, Literal, get_origin

import click

from ptq_tdq.choices import Choice, Choices, described, groups, shown
from ptq_tdq.cli.options import json_option, print_json
from ptq_tdq.config import PRESETS, Config
from ptq_tdq.finetuning import FinetuneConfig


@click.command("choices")
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--finetune", is_flag=True, help="Those of `finetune` in the place of those of `calibrate`.")
@json_option
def choices_command(names: tuple[str, ...], finetune: bool, as_json: bool) -> None:
    """List the choices of calibrate, or of finetune, with their meanings.

    NAME is a choice or a group of them; all are shown by default. --set, the files of --config (with a table for each
    group) and Python take their names.
    """
    record: type[Choices] = FinetuneConfig if finetune else Config
    chosen = _named(record, names)
    if as_json:
        print_json([_plain(about) for about in chosen])
        return
    presets = {} if finetune else PRESETS
    formatter = click.get_current_context().make_formatter()
    for name, group in {"": record, **groups(record)}.items():
        if rows := [(about.name, _text(about, presets)) for about in chosen if about.group == name]:
            with formatter.section(name or "without a group"):
                if name:
                    formatter.write_text(cleandoc(group.__doc__ or ""))
                formatter.write_dl(rows)
    click.echo(formatter.getvalue().strip())


def _named(record: type[Choices], names: Iterable[str]) -> list[Choice]:
    """The choices that are named, by themselves or by their groups; without names all of them."""
    wanted = [name.replace("-", "_") for name in names]
    record.named({name: None for name in wanted if name not in groups(record)})
    known = described(record).values()
    return [about for about in known if not wanted or about.name in wanted or about.group in wanted]


def _text(about: Choice, presets: Mapping[str, Mapping[str, Any]]) -> str:
    """The help of a choice, with its default and the presets that have another value."""
    listed = get_origin(about.kind) is Literal  # names, which are written as they are given
    values = f"  {about.values if listed else about.values.capitalize()}."
    values = "" if about.alternatives or not about.values else values
    others = {name: choices[about.name] for name, choices in presets.items() if about.name in choices}
    sources = "; ".join(f"{name}: {shown(value)}" for name, value in {"default": about.default, **others}.items())
    return f"{about.text}{values}  [{sources}]"


def _plain(about: Choice) -> dict[str, Any]:
    """A choice as JSON data."""
    names = [f.name for f in fields(about) if f.name not in ("kind", "bounds")]
    return {**{name: getattr(about, name) for name in names}, "values": about.values}
