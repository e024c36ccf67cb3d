"""A call of a unit with one tensor of rows, as a sweep would hand it over."""

from __future__ import annotations

from torch import Tensor

from ptq_tdq.recon.parts import Part, Parts, Place
from ptq_tdq.recon.streams import UnitCall


def call_of(unit: str, x: Tensor) -> UnitCall:
    """``x`` [N, ...] is the only argument; the output has one row for each of its rows."""
    rows = (Place(0, 1),)
    return UnitCall(unit, Parts((Part.of(((x,), {}), slice(0, len(x)), rows),)), (rows,))
