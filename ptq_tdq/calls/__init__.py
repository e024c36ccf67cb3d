"""Calls of a denoiser: one forward pass with all its arguments is one value, and a calibration set is many of them."""

from ptq_tdq.calls.arguments import Each, Group, Place, bind, fresh, hear_positions, main_argument, main_argument_name
from ptq_tdq.calls.calls import Calls
from ptq_tdq.calls.outputs import prediction, tensors_of
from ptq_tdq.calls.recorder import Recorder, record

__all__ = [
    "Calls",
    "Each",
    "Group",
    "Place",
    "Recorder",
    "bind",
    "fresh",
    "hear_positions",
    "main_argument",
    "main_argument_name",
    "prediction",
    "record",
    "tensors_of",
]
