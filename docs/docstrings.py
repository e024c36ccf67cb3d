"""Docstrings as Markdown: roles of reStructuredText become code, ``::`` before an indented block a colon.

A drawn tree becomes a block of its own.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":\w+:`~?(?:[\w.]*\.)?(\w+)`")


class Roles(griffe.Extension):
    """Rewrites each docstring when its object is known."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            text = ROLE.sub(r"`\1`", obj.docstring.value)
            text = re.sub(r"(?m)^::$", "", re.sub(r"(?m)(?<=\S)::$", ":", text))
            obj.docstring.value = re.sub(r"(?ms)^(\w+\n├.*)", r"```text\n\1\n```", text)
