"""Flags and output that several commands share."""

from __future__ import annotations

import errno
import functools
import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from click.core import ParameterSource
from rich.console import Console

from ptq_tdq import launch
from ptq_tdq.calib_data import EMBEDDED, LoadedModel, read_prompts
from ptq_tdq.choices import Choices, described, pair
from ptq_tdq.config import read_config_file
from ptq_tdq.errors import ConfigError, UsageError
from ptq_tdq.files import reason

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

UNLIMITED = 1000  # columns; a table takes only what it needs


def _together(*options: Decorator) -> Decorator:
    """Several options as one, listed in this order."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def _set_threads(context: click.Context, parameter: click.Parameter, value: int) -> int:
    torch.set_num_threads(value)
    return value


def _set_verbose(context: click.Context, parameter: click.Parameter, value: bool) -> bool:
    context.ensure_object(dict)["verbose"] = value  # the entry point reads it when an error ends the run
    return value


class FilePath(click.Path):
    """A path whose name this system can take; what is there is for the command to say. ``~`` is the home folder, which
    shells leave as it is behind ``--option=``.
    """

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> Path:
        if not os.fspath(value):  # of a variable that the shell does not know; it would be the current folder
            self.fail("the path is empty.", parameter, context)
        if os.fspath(value) == "-":
            self.fail("'-' is no file here; name one, or write ./- for one that is called so.", parameter, context)
        value = os.path.expanduser(value)
        try:
            os.stat(value)
        except (OSError, ValueError) as error:
            if isinstance(error, ValueError) or error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
                self.fail(f"{str(value)[:100]!r} cannot be a path here ({reason(error)}).", parameter, context)
        return Path(os.fsdecode(super().convert(value, parameter, context)))


def _read_prompts(context: click.Context, parameter: click.Parameter, value: Path | None) -> list[str] | None:
    return None if value is None else read_prompts(value)


def _read_classes(context: click.Context, parameter: click.Parameter, value: str | None) -> list[int] | None:
    if value is None:
        return None
    try:
        return [int(text) for text in value.split(",")]
    except ValueError:
        raise ConfigError(f"--classes takes numbers with commas between them, such as 1,5,7. Got {value!r}.") from None


def _read_dtype(context: click.Context, parameter: click.Parameter, value: str) -> torch.dtype:
    dtype = getattr(torch, value)
    assert isinstance(dtype, torch.dtype)
    return dtype


_CALL = ("guidance_scale", "height", "width")  # arguments of a pipeline with a flag of their own

_MODEL_OPTIONS = (
    click.option("--component", metavar="NAME", help="The denoiser, where the pipeline has several."),
    click.option("--device", default="cpu", show_default=True, help="Where it runs: cpu, cuda, cuda:1, mps, ..."),
    click.option(
        "--dtype",
        type=click.Choice(["float32", "bfloat16", "float16"]),
        default="float32",
        show_default=True,
        callback=_read_dtype,
        help="Of the full-precision model.",
    ),
    click.option(
        "--prompts",
        type=FilePath(),
        callback=_read_prompts,
        help="A text file, one prompt per line, for text-conditional pipelines.  [default: a short list of our own]",
    ),
    click.option("--classes", metavar="N,N,...", callback=_read_classes, help="Classes to sample.  [default: all]"),
    click.option("--guidance-scale", type=float, help="Of the pipeline.  [default: its own]"),
    click.option(
        "--height", type=click.IntRange(1, 1 << 16), help="Of the samples, in pixels.  [default: the pipeline's]"
    ),
    click.option(
        "--width", type=click.IntRange(1, 1 << 16), help="Of the samples, in pixels.  [default: the pipeline's]"
    ),
    click.option(
        "--call",
        "call",
        multiple=True,
        metavar="KEY=VALUE",
        help="Any other argument of the pipeline (num_frames=16, max_sequence_length=128).",
    ),
)


def _model_options(source: Decorator) -> Decorator:
    """``--model`` and what says how it samples: a command gets ``source`` and the arguments of ``load_model``."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def wrapped(*args: Any, call: tuple[str, ...], **values: Any) -> Any:
            flags = {key: value for key in _CALL if (value := values.pop(key)) is not None}
            return command(*args, call={**flags, **_read_call(call)}, **values)

        return _together(source, *_MODEL_OPTIONS)(wrapped)

    return decorate


def _read_call(texts: tuple[str, ...]) -> dict[str, Any]:
    """KEY=VALUE pairs; a value is a number, true, false or null where it reads as one, else text."""
    found = {}
    for key, value in (pair(text, "--call") for text in texts):
        try:
            found[key] = json.loads(value)
        except (ValueError, RecursionError):
            found[key] = value
    return found


model_options: Decorator = _model_options(
    click.option(
        "--model",
        "source",
        metavar="FOLDER|HUB_ID",
        help="A diffusers pipeline or denoiser: a local folder or a hub id; or one of the embedded models, "
        f"{', '.join(EMBEDDED)}.  [default: reference]",
    )
)
original_options: Decorator = _model_options(
    click.option(
        "--model",
        "source",
        metavar="FOLDER|HUB_ID",
        help="The full-precision model.  [default: the one that the artifact was made from]",
    )
)
steps_option: Decorator = click.option(
    "--num-inference-steps",
    type=click.IntRange(1, (1 << 20) - 1),
    default=25,
    show_default=True,
    help="Steps of the sampler.",
)
scheduler_option: Decorator = click.option(
    "--scheduler",
    metavar="CLASS",
    help="Any diffusers scheduler, e.g. EulerDiscreteScheduler.  [default: the model's own]",
)
seed_option: Decorator = click.option(
    "--seed", type=click.IntRange(0, (1 << 32) - 1), default=0, show_default=True, help="Seed of the noise."
)


class Size(click.ParamType[int]):
    """A number of bytes: 2GiB, 512MiB, 1.5 GB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?) ?([KMGT]?)(i?)B?", value.strip(), re.IGNORECASE | re.ASCII)
        if not found:
            self.fail(f"{value!r} is no size; write a number and a unit, such as 2GiB or 512MiB.", param, ctx)
        number, prefix, binary = found.groups()
        return int(float(number) * (1024 if binary else 1000) ** " KMGT".index(prefix.upper() or " "))


json_option: Decorator = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
backend_option: Decorator = click.option(
    "--backend",
    type=click.Choice(["simulated", "integer"]),
    default="simulated",
    show_default=True,
    help="Floating point on the integer grid, or integer arithmetic (fast).",
)
verbose_option: Decorator = click.option(
    "-v", "--verbose", is_flag=True, callback=_set_verbose, help="Say more; show a traceback for errors."
)
quiet_option: Decorator = click.option(
    "-q", "--quiet", is_flag=True, help="Say nothing but errors and the result of --json."
)
run_options: Decorator = _together(
    click.option("--resume/--no-resume", default=True, show_default=True, help="Go on with an unfinished run."),
    click.option("--overwrite", is_flag=True, help="Replace an artifact that is already there."),
    click.option(
        "--evaluation-samples",
        type=click.IntRange(min=0, max=1 << 20),
        show_default="64; 4 with a pipeline",
        help="Samples on which the result is measured; 0 measures nothing.",
    ),
)


def evaluation_count(given: int | None, model: LoadedModel) -> int:
    """Samples on which a result is measured: the ``given`` number, else a small batch of the model's sampler."""
    return min(64, model.sampler.batch) if given is None else given


_FILE_OPTIONS = (
    click.option("--config", "config_file", type=FilePath(), help="TOML or JSON file of choices."),
    click.option(
        "--set",
        "settings",
        multiple=True,
        metavar="KEY=VALUE",
        help="Any choice by name, of several values its last; `ptq-tdq choices` lists them.",
    ),
    click.option("--show-config", is_flag=True, help="Print every choice as JSON, fit for --config, and stop."),
)


def choice_options(record: type[Choices], flags: Mapping[str, str], default: str = "default") -> Decorator:
    """A flag for each choice that users name most (name -> metavar), ``--config``, ``--set`` and ``--show-config``."""
    known = described(record)
    options = (
        click.option(
            f"--{name.replace('_', '-')}",
            name,
            metavar=metavar,
            help=f"{known[name].text}  [{default}: {known[name].default}]",
        )
        for name, metavar in flags.items()
    )
    return _together(*options, *_FILE_OPTIONS)


def read_choices(record: type[Choices], file: Path | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """Choices by name: those of the file, then ``given`` ones; None is none."""
    found = record.named(read_config_file(file)) if file else {}
    return found | {name: value for name, value in given.items() if value is not None}


def read_settings(settings: Sequence[str]) -> dict[str, str]:
    """The choices that ``--set`` names."""
    return dict(pair(text, "--set") for text in settings)


def _cores() -> int:
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, there // launch.here())


threads_option: Decorator = click.option(
    "--threads",
    type=click.IntRange(1, 1024),
    default=_cores,
    show_default="the cores that this process may use, shared by those of a launch",
    callback=_set_threads,
    expose_value=False,
    help="CPU threads; the last digits of a result depend on them.",
)


def refuse_others(names: Collection[str], why: str) -> None:
    """Raise :class:`UsageError` for what the user has given to the running command beside the options ``names``."""
    context = click.get_current_context()
    for option in context.command.params:
        name = option.name or ""
        if name not in names and context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise UsageError(f"{why}; leave out {option.opts[0]}.")


def refuse_inside(output: Path, artifacts: Iterable[Path]) -> None:
    """Raise :class:`UsageError` for an output in the folder of one of the artifacts that are read."""
    for artifact in artifacts:
        if output.resolve().is_relative_to(artifact.resolve()):
            raise UsageError(
                f"The output '{output}' lies in the artifact, which holds nothing else; choose another path."
            )


def numbered(names: Sequence[str]) -> list[str]:
    """The names, with a number where several are alike."""
    return [x if names.count(x) == 1 else f"{x} ({names[: i + 1].count(x)})" for i, x in enumerate(names)]


def print_json(value: Any) -> None:
    """One JSON document on stdout, of several processes by the first."""
    if launch.is_first():
        click.echo(json.dumps(value, indent=2, sort_keys=True, allow_nan=False))


def result_console() -> Console:
    """Where results are drawn: stdout, as wide as the terminal; a file or a pipe gets every column in full."""
    console = Console(highlight=False, markup=False)
    return console if console.is_terminal else Console(highlight=False, markup=False, width=UNLIMITED)
