"""Interval sources: one file each, found by being in this folder (see ``base.py``)."""

from importlib import import_module
from pkgutil import iter_modules

from ptq_tdq.intervals.base import IntervalSource, LearnedScale, Observed, source_class
from ptq_tdq.intervals.choices import IntervalChoices

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = ["IntervalChoices", "IntervalSource", "LearnedScale", "Observed", "source_class"]
