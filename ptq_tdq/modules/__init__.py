"""Quantized modules: activation and weight quantizers, layers, attention."""

from ptq_tdq.modules.activation import ActivationQuantizer
from ptq_tdq.modules.attention import QuantAttnProcessor
from ptq_tdq.modules.layers import QUANTIZED_LAYERS, QuantLayer, layer_kind
from ptq_tdq.modules.weight import WeightQuantizer

__all__ = [
    "QUANTIZED_LAYERS",
    "ActivationQuantizer",
    "QuantAttnProcessor",
    "QuantLayer",
    "WeightQuantizer",
    "layer_kind",
]
