"""Post-training quantization of diffusion models with time-dependent activation intervals."""

from importlib.metadata import version

from ptq_tdq.calib_data import collect, load_model
from ptq_tdq.calibrate import calibrate
from ptq_tdq.calls import Calls, record
from ptq_tdq.config import Config, preset
from ptq_tdq.errors import PtqTdqError
from ptq_tdq.load import load_quantized
from ptq_tdq.quantized_model import QuantizedModel
from ptq_tdq.scheme import Scheme

__version__ = version("ptq-tdq")

__all__ = [
    "Calls",
    "Config",
    "PtqTdqError",
    "QuantizedModel",
    "Scheme",
    "calibrate",
    "collect",
    "load_model",
    "load_quantized",
    "preset",
    "record",
]
