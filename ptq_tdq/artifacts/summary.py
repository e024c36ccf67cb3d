"""What an artifact holds, as plain data for ``ptq-tdq inspect``."""

from __future__ import annotations

from typing import Any

from ptq_tdq.artifacts.artifact import Artifact, IntervalTable
from ptq_tdq.artifacts.store import encode_artifact
from ptq_tdq.records import LayerRecord, QuantizerRecord, choice_text
from ptq_tdq.timeaxis import TimeAxis

_FP32_BYTES = 4


def summarize(artifact: Artifact) -> dict[str, Any]:
    """JSON-ready facts of the artifact.

    "bytes" per file and in all, "fp32_bytes" of the same weights in float32, "compression" = fp32_bytes / bytes;
    "quantizers": one row per activation quantizer, scales at t = 0, T // 2 and T (None for dynamic quantizers);
    "weights": one row per quantized weight; "time_axis": how the model's time argument becomes t, as numbers and as
    "text"; "coverage": share of the multiply-accumulates with weights that quantized layers do
    (None where calibration did not say); "mean_bits" of "weights" and of "activations" per multiply-accumulate (None
    likewise); "choices": those of calibration, by group; "notices": what stays in floating point, and why; "choice":
    which quantizers follow t, where "auto" chose.
    """
    config = artifact.config
    file_bytes = {name: len(data) for name, data in sorted(encode_artifact(artifact).items())}
    values = [*artifact.weight_codes.values(), *artifact.float_state.values()]
    fp32_bytes = _FP32_BYTES * sum(tensor.numel() for tensor in values)
    return {
        "base_model": config["base_model"],
        "scheme": config["scheme"],
        "method": config["method"],
        "preset": config["preset"],
        "choices": config["choices"],
        "num_train_timesteps": artifact.num_train_timesteps,
        "time_axis": {**artifact.time_axis.to_dict(), "text": _axis_text(artifact.time_axis)},
        "coverage": artifact.metrics.get("coverage"),
        "mean_bits": artifact.metrics.get("mean_bits"),
        "notices": artifact.metrics.get("notices", []),
        "choice": choice_text(artifact.quantizers),
        "num_layers": len(artifact.layers),
        "file_bytes": file_bytes,
        "bytes": sum(file_bytes.values()),
        "fp32_bytes": fp32_bytes,
        "compression": fp32_bytes / sum(file_bytes.values()),
        "quantizers": [_quantizer_row(quantizer, artifact.tables[quantizer.name]) for quantizer in artifact.quantizers],
        "weights": [_weight_row(artifact, layer) for layer in artifact.layers if layer.weight_bits is not None],
        "metrics": artifact.metrics,
    }


def _axis_text(axis: TimeAxis) -> str:
    """How the model's time argument becomes t, as an equation."""
    name = f"'{axis.argument}'"
    factor = f"{abs(axis.scale):g} \N{MULTIPLICATION SIGN} {name}"
    if axis.scale == 1 and axis.offset == 0:
        equation = f"t = {name}"
    elif axis.scale < 0:
        equation = f"t = {axis.offset:g} \N{MINUS SIGN} {factor}"
    else:
        sign = "\N{MINUS SIGN}" if axis.offset < 0 else "+"
        equation = f"t = {factor}" + (f" {sign} {abs(axis.offset):g}" if axis.offset else "")
    return f"{equation}, from 0 to {axis.num_train_timesteps}"


def _quantizer_row(quantizer: QuantizerRecord, table: IntervalTable) -> dict[str, Any]:
    row: dict[str, Any] = {
        "name": quantizer.name,
        "method": quantizer.method,
        "gain_db": quantizer.gain_db,
        "bits": quantizer.bits,
        "zero_point_min": int(table.zero_point.min()),
        "zero_point_max": int(table.zero_point.max()),
    }
    if table.scale is None:
        return row | dict.fromkeys(("scale_first", "scale_middle", "scale_last", "scale_mean", "scale_max_over_min"))
    scale = table.scale.double()
    return row | {
        "scale_first": scale[0].item(),
        "scale_middle": scale[len(scale) // 2].item(),
        "scale_last": scale[-1].item(),
        "scale_mean": scale.mean().item(),
        "scale_max_over_min": (scale.max() / scale.min()).item(),
    }


def _weight_row(artifact: Artifact, layer: LayerRecord) -> dict[str, Any]:
    channels = artifact.weight_scale[layer.name].shape[0]
    return {
        "name": layer.name,
        "kind": layer.kind,
        "shape": list(artifact.weight_codes[layer.name].shape),
        "bits": layer.weight_bits,
        "granularity": "per_tensor" if channels == 1 else "per_channel",
        "channel_ranges": len(layer.ranges),
    }
