"""A module in the place of another one."""

from __future__ import annotations

from typing import Any

from torch import nn


class Delegating(nn.Module):
    """Attributes that it has not are those of the module that its attribute ``_inside`` names.

    A child of that module is replaced there.
    """

    _inside = "model"

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == self._inside:  # not there yet
                raise
            return getattr(getattr(self, self._inside), name)

    def __setattr__(self, name: str, value: Any) -> None:
        own = self.__dict__.get("_modules", {})
        inside = own.get(self._inside)
        child = isinstance(value, nn.Module | None) and name not in own
        if child and inside is not None and name in inside._modules:
            setattr(inside, name, value)
        else:
            super().__setattr__(name, value)
