"""Records of choices: each choice is declared once, with its meaning, unit, bounds, alternatives and source.

Checks, files, help and the reference page come from these declarations. A record may hold groups, which are records
too. The name of a choice is unique over the groups of its record, so ``--set`` and Python need no group; files and
saved JSON have a table for each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from math import inf
from sys import float_info
from typing import Any, Literal, Self, TypeVar, get_args, get_origin, get_type_hints

from ptq_tdq.errors import ConfigError

Bounds = tuple[float, float]
COUNT: Bounds = (1, 1 << 20)
ITERATIONS: Bounds = (0, 1 << 31)
SEED: Bounds = (0, 1 << 32)
POSITIVE: Bounds = (float_info.min, inf)
NOT_NEGATIVE: Bounds = (0, inf)
AT_LEAST_ONE: Bounds = (1, inf)
SHARE: Bounds = (0, 1)

T = TypeVar("T")


def choice(
    default: T,
    meaning: str,
    *,
    unit: str = "",
    bounds: Bounds | None = None,
    alternatives: Mapping[str, str] | None = None,
    source: str = "",
) -> T:
    """Declare a field of a :class:`Choices`; the arguments are those of a :class:`Choice`."""
    about = {"meaning": meaning, "unit": unit, "bounds": bounds, "alternatives": alternatives or {}, "source": source}
    return field(default=default, metadata=about)


@dataclass(frozen=True)
class Choice:
    """What is known of a choice.

    ``kind`` is its type: bool, int, float, str, Literal, or a tuple of one of these. ``bounds`` are a number's least
    value and the first that is too large, ``alternatives`` the meaning of each value of a Literal, ``source`` the paper
    that it comes from.
    """

    name: str
    group: str
    kind: Any
    default: Any
    meaning: str
    unit: str
    bounds: Bounds | None
    alternatives: Mapping[str, str]
    source: str

    def checked(self, value: Any) -> Any:
        """``value`` in the form that is stored, read from text where needed. Raises :class:`ConfigError`."""
        found = _checked(self.name, value, self.kind)
        if self.bounds and not self.bounds[0] <= found < self.bounds[1]:
            raise ConfigError(f"{self.name} must be {_bounds(self.kind, *self.bounds)}. Got {found} instead.")
        return found

    @property
    def values(self) -> str:
        """What it may be, with its unit."""
        parts = _values(self.kind), self.unit and f"({self.unit})", self.bounds and _bounds(self.kind, *self.bounds)
        return " ".join(part for part in parts if part)

    @property
    def text(self) -> str:
        """Meaning, alternatives and source."""
        listed = "; ".join(f"{name}: {meaning}" for name, meaning in self.alternatives.items())
        return " ".join(
            part for part in (self.meaning, listed and f"{listed}.", self.source and f"({self.source})") if part
        )


@dataclass(frozen=True)
class Choices:
    """Base of a frozen dataclass whose fields are each a :func:`choice` or a group of them, another such dataclass.

    Text is read as the choice's type, a list names each of its items once. Raises :class:`ConfigError`.
    """

    def __post_init__(self) -> None:
        known = described(type(self))
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name in known:
                object.__setattr__(self, f.name, known[f.name].checked(value))
            elif not isinstance(value, Choices):
                raise ConfigError(f"{f.name} is a group of choices; change them by their own names.")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data: every choice by name, those of a group together."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)}

    def changed(self, choices: Mapping[str, Any]) -> Self:
        """A copy with some choices replaced; values may be text, as a flag gives them. Raises :class:`ConfigError`."""
        tables: dict[str, dict[str, Any]] = {"": {}}
        for name, value in self.named(choices).items():
            tables.setdefault(described(type(self))[name].group, {})[name] = value
        own = tables.pop("")
        return replace(self, **own, **{group: replace(getattr(self, group), **tables[group]) for group in tables})

    @classmethod
    def named(cls, choices: Mapping[str, Any]) -> dict[str, Any]:
        """Choices by their own names, where they may be in tables by group. Raises :class:`ConfigError`."""
        known, found = described(cls), dict[str, Any]()
        tables = groups(cls)
        for key, value in choices.items():
            grouped = key in tables
            if grouped and not isinstance(value, Mapping):
                raise ConfigError(f"{key} is a group of choices; give a table of them, or each by its own name.")
            for name, inner in (value if grouped else {key: value}).items():
                if name not in known:
                    raise ConfigError(f"There is no choice named {name!r}; {_nearest(name, (*known, *tables))}")
                if grouped and known[name].group != key:
                    raise ConfigError(f"{name} is a choice of {known[name].group or 'no group'}, not of {key}.")
                if name in found:
                    raise ConfigError(f"{name} is there twice, in its group and outside.")
                found[name] = inner
        return found


_DESCRIBED: dict[type[Choices], dict[str, Choice]] = {}  # reading type hints takes milliseconds


def described(record: type[Choices]) -> dict[str, Choice]:
    """All choices of a record, by name, those of groups last."""
    if record not in _DESCRIBED:
        hints = get_type_hints(record)
        own = [Choice(f.name, "", hints[f.name], f.default, **f.metadata) for f in fields(record) if f.metadata]
        inner = [replace(x, group=name) for name, group in groups(record).items() for x in described(group).values()]
        _DESCRIBED[record] = {about.name: about for about in (*own, *inner)}
    return _DESCRIBED[record]


def groups(record: type[Choices]) -> dict[str, type[Choices]]:
    """The groups of a record, by name."""
    hints = get_type_hints(record)
    return {f.name: hints[f.name] for f in fields(record) if not f.metadata}


def ungrouped(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Saved choices by their own names, out of the groups that they are saved in."""
    found: dict[str, Any] = {}
    for key, value in saved.items():
        found |= value if isinstance(value, Mapping) else {key: value}
    return found


def pair(text: str, where: str) -> tuple[str, str]:
    """Name and value of a KEY=VALUE given at ``where``; "-" in the name is "_". Raises :class:`ConfigError`."""
    key, equals, value = (part.strip() for part in text.partition("="))
    if not key or not equals:
        raise ConfigError(f"{where} takes KEY=VALUE. Got {text!r} instead.")
    return key.replace("-", "_"), value


def shown(value: Any) -> str:
    """A value as text."""
    if isinstance(value, tuple):
        return ", ".join(value) or "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _checked(name: str, value: Any, kind: Any) -> Any:
    """``value`` as ``kind`` (see :class:`Choice`)."""
    if get_origin(kind) is tuple:
        if not isinstance(value, str | list | tuple):
            raise ConfigError(f"{name} must be a list. Got {value!r} instead.")
        items = [v for v in map(str.strip, value.split(",")) if v] if isinstance(value, str) else list(value)
        return tuple(dict.fromkeys(_checked(name, item, get_args(kind)[0]) for item in items))
    if isinstance(value, str):
        value = value.strip()
    if get_origin(kind) is Literal:
        if value in get_args(kind):
            return value
        raise ConfigError(f"{name} must be one of {', '.join(get_args(kind))}. Got {value!r} instead.")
    try:
        return _read(value, kind)
    except (KeyError, TypeError, ValueError, OverflowError):
        raise ConfigError(f"{name} must be of type {kind.__name__}. Got {value!r} instead.") from None


def _read(value: Any, kind: type) -> Any:
    """``value`` as a bool, int, float or str; raises KeyError, TypeError, ValueError or OverflowError."""
    if kind is str:
        str.encode(value)  # a file name that is not UTF-8 could not be saved
        return value
    if kind is bool:
        return value if isinstance(value, bool) else {"true": True, "false": False}[str.lower(value)]
    if isinstance(value, str):
        if not value.isascii() or "_" in value:  # int() reads the digits of all scripts
            raise ValueError
        return kind(value)
    number = kind(value)
    if isinstance(value, bool) or number != value:
        raise ValueError
    return number


def _nearest(name: str, known: Sequence[str]) -> str:
    near = get_close_matches(str(name), known)
    return f"did you mean {', '.join(near)}?" if near else "`ptq-tdq choices` lists them."


def _bounds(kind: type, least: float, limit: float) -> str:
    if kind is int and limit < inf:
        return f"from {least} to {int(limit) - 1}"
    if limit < inf:
        return f"at least {least} and below {limit}"
    return f"at least {least} and finite" if least in (0, 1) else "above 0 and finite"


def _values(kind: Any) -> str:
    if get_origin(kind) is tuple:
        return "list"
    if get_origin(kind) is Literal:
        return ", ".join(get_args(kind))
    return {bool: "true or false", int: "whole number", float: "number", str: ""}[kind]


def _plain(value: Any) -> Any:
    if isinstance(value, Choices):
        return value.to_dict()
    return list(value) if isinstance(value, tuple) else value
