"""Quantized modules: activation and weight quantizers, layers, attention products."""

from ptq_tdq.modules.activation import ActivationQuantizer
from ptq_tdq.modules.layers import QuantLayer, layer_kind
from ptq_tdq.modules.products import QuantProduct
from ptq_tdq.modules.weight import WeightQuantizer

__all__ = ["ActivationQuantizer", "QuantLayer", "QuantProduct", "WeightQuantizer", "layer_kind"]
