"""The tables run: integer execution on the CPU."""

from ptq_tdq.runtime.model import IntegerModel

__all__ = ["IntegerModel"]
