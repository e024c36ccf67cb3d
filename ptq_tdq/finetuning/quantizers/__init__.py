"""Quantizers of fine-tuning: one file each, found by being in this folder (see ``base.py``)."""

from importlib import import_module
from pkgutil import iter_modules

from ptq_tdq.finetuning.quantizers.base import Quantizer, quantizer_class

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = ["Quantizer", "quantizer_class"]
