"""A module in the place of another one."""

from __future__ import annotations

from typing import Any

from torch import nn


class Delegating(nn.Module):
    """Attributes that it has not are those of the module that its attribute ``_inside`` names."""

    _inside = "model"

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__(self._inside), name)
