"""What ``torchrun`` or ``accelerate launch`` tells a process of those that it has started, before they have joined."""

from __future__ import annotations

import os


def launched() -> int:
    """How many there are, on all machines: 1 where no launcher has numbered them."""
    return _number("WORLD_SIZE", 1) if "RANK" in os.environ else 1


def here() -> int:
    """How many of them are on this machine."""
    return _number("LOCAL_WORLD_SIZE", 1)


def place() -> int:
    """The number of this one among those on this machine, from 0."""
    return _number("LOCAL_RANK", 0)


def is_first() -> bool:
    """Whether this one is the first of all; it speaks for them."""
    return launched() == 1 or os.environ["RANK"] == "0"


def is_first_here() -> bool:
    """Whether this one is the first of those on this machine; it tells what may be true of this machine alone."""
    return launched() == 1 or place() == 0


def _number(name: str, otherwise: int) -> int:
    """What a launcher has set, or what is so where none has: others use these names for something else."""
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else otherwise
