"""Quantized models for other programs."""

from ptq_tdq.export.tables import export_tables, interval_frame

__all__ = ["export_tables", "interval_frame"]
