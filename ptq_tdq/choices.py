"""What frozen records of choices share: each is read as its type, checked, and known by its name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from math import inf
from typing import Any, ClassVar, Literal, Self, get_args, get_origin, get_type_hints

from ptq_tdq.errors import ConfigError


@dataclass(frozen=True)
class Choices:
    """Base of a frozen dataclass of choices (bool, int, float, str, Literal, or a tuple of one of these).

    Text is read as the choice's type, a list names each of its items once. ``bounds`` gives a number's least value and
    the first that is too large. Raises :class:`ConfigError`.
    """

    bounds: ClassVar[Mapping[str, tuple[float, float]]] = {}

    def __post_init__(self) -> None:
        for name, kind in _kinds(type(self)).items():
            object.__setattr__(self, name, checked(name, getattr(self, name), kind))
        for name, (least, limit) in self.bounds.items():
            value = getattr(self, name)
            if not least <= value < limit:
                raise ConfigError(f"{name} must be {_bounds(least, limit)}. Got {value} instead.")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data, every choice by name."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)}

    def changed(self, choices: Mapping[str, Any]) -> Self:
        """A copy with some choices replaced; values may be text, as a flag gives them. Raises :class:`ConfigError`."""
        unknown = sorted(set(choices) - {f.name for f in fields(self)})
        if unknown:
            raise ConfigError(f"There is no choice named {unknown[0]!r}; the choices are {', '.join(self.to_dict())}.")
        return replace(self, **choices)


def checked(name: str, value: Any, kind: Any) -> Any:
    """``value`` as ``kind`` (bool, int, float, str, Literal or tuple of one of these), read from text where needed."""
    if get_origin(kind) is tuple:
        if not isinstance(value, str | list | tuple):
            raise ConfigError(f"{name} must be a list. Got {value!r} instead.")
        items = [v for v in map(str.strip, value.split(",")) if v] if isinstance(value, str) else list(value)
        return tuple(dict.fromkeys(checked(name, item, get_args(kind)[0]) for item in items))
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


def _kinds(cls: type[Choices]) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {f.name: hints[f.name] for f in fields(cls)}


def _bounds(least: float, limit: float) -> str:
    if limit < inf:
        return f"at least {least} and below {limit}"
    return f"at least {least} and finite" if least in (0, 1) else "above 0 and finite"


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


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
