"""ONNX: one graph per runtime, with the interval tables inside, and a U-Net that runs it."""

from ptq_tdq.export.extras import missing

try:
    from ptq_tdq.export.onnx.file import FORMS, export_onnx, export_onnx_float
    from ptq_tdq.export.onnx.unet import OnnxUNet
except ImportError as error:
    raise missing(error, "onnx") from error

__all__ = ["FORMS", "OnnxUNet", "export_onnx", "export_onnx_float"]
