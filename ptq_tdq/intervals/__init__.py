"""Interval sources: one file each, found by being in this folder (see ``base.py``)."""

from importlib import import_module
from pkgutil import iter_modules

from ptq_tdq.intervals.base import Encoding, IntervalOptions, IntervalSource, LearnedScale, Observed, source_class

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = ["Encoding", "IntervalOptions", "IntervalSource", "LearnedScale", "Observed", "source_class"]
