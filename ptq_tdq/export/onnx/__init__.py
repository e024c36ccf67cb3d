"""ONNX: one graph per runtime, with the interval tables inside, and a denoiser that runs it."""

from ptq_tdq.extras import missing

try:
    from ptq_tdq.export.onnx.denoiser import OnnxDenoiser
    from ptq_tdq.export.onnx.file import FORMS, export_onnx, export_onnx_float, export_onnx_steps
except ImportError as error:
    raise missing(error, "onnx") from error

__all__ = ["FORMS", "OnnxDenoiser", "export_onnx", "export_onnx_float", "export_onnx_steps"]
