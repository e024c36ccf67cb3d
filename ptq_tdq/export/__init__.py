"""Quantized models for other programs; ONNX is in :mod:`ptq_tdq.export.onnx`, an extra."""

from ptq_tdq.export.tables import export_tables, interval_frame

__all__ = ["export_tables", "interval_frame"]
