"""Post-training quantization of diffusion models with time-dependent activation intervals."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ptq_tdq.calib_data import load_model
    from ptq_tdq.calib_data.collect import collect
    from ptq_tdq.calibration import calibrate
    from ptq_tdq.calls import Calls, record
    from ptq_tdq.config import Config, preset
    from ptq_tdq.errors import PtqTdqError
    from ptq_tdq.finetuning import FinetuneConfig, finetune
    from ptq_tdq.load import load_quantized
    from ptq_tdq.quantized_model import QuantizedModel
    from ptq_tdq.scheme import Scheme

__version__ = version("ptq-tdq")

__all__ = [
    "Calls",
    "Config",
    "FinetuneConfig",
    "PtqTdqError",
    "QuantizedModel",
    "Scheme",
    "calibrate",
    "collect",
    "finetune",
    "load_model",
    "load_quantized",
    "preset",
    "record",
]

_HOMES = {  # imported when they are first used: `ptq-tdq --help` needs no torch
    **dict.fromkeys(("collect", "load_model"), "calib_data"),
    "calibrate": "calibration",
    **dict.fromkeys(("Calls", "record"), "calls"),
    **dict.fromkeys(("Config", "preset"), "config"),
    "PtqTdqError": "errors",
    **dict.fromkeys(("FinetuneConfig", "finetune"), "finetuning"),
    "load_quantized": "load",
    "QuantizedModel": "quantized_model",
    "Scheme": "scheme",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
