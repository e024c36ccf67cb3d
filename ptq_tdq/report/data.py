"""The numbers of a report as plain JSON data: what the page embeds, and what the figures are drawn from.

Steps are in ascending order of t, whatever the order of the sampler. Curves over all T time steps are thinned to
``{"t": [...], "v": [...]}``, within 0.3% of their quantizer's range.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ptq_tdq.artifacts import Artifact, IntervalTable, summarize
from ptq_tdq.records import QuantizerRecord
from ptq_tdq.report.curves import magnitude, quantiles, short, shorts, thin
from ptq_tdq.report.measure import Activation, LayerErrors
from ptq_tdq.report.survey import PICTURES, Subject, Survey, times
from ptq_tdq.scheme import QType
from ptq_tdq.search import Histogram, activation_qparams
from ptq_tdq.timeaxis import lookup

LEVELS = (0.01, 0.25, 0.5, 0.75, 0.99)  # quantiles of the distributions
TOLERANCE = 0.003  # of a quantizer's range: how far a thinned curve may be off

Json = dict[str, Any]


def report_data(found: Survey) -> Json:
    """Everything that the page shows but its pictures, by the names that ``page.js`` uses."""
    first = found.subjects[0].artifact
    reference = found.reference
    order = None if reference is None else times(reference).argsort(stable=True)
    steps = torch.empty(0) if reference is None or order is None else times(reference)[order]
    activations: Json = {}
    for subject in found.subjects:
        for name, activation in (subject.measured.activations if subject.measured else {}).items():
            if name not in activations and order is not None:
                activations[name] = _activation(activation, order)
    labels = None if reference is None else reference.class_labels
    searched: dict[tuple[Any, ...], Tensor] = {}
    return {
        "version": version("ptq-tdq"),
        "model": {"id": _name(first.config["base_model"]["id"]), "sha256": first.config["base_model"]["sha256"]},
        "num_train_timesteps": first.num_train_timesteps,
        "steps": shorts(steps, 6),
        "samples": 0 if reference is None else len(reference.noise),
        "sampler": None if reference is None else type(reference.model.scheduler).__name__,
        "seed": found.seed,
        "classes": 0 if labels is None else int(labels.max()) + 1,
        "levels": list(LEVELS),
        "pictures": PICTURES,
        "activations": activations,
        "artifacts": [_subject(subject, order, steps, searched) for subject in found.subjects],
        "notices": list(found.notices),
    }


def _activation(activation: Activation, order: Tensor) -> Json:
    by_step = activation.by_step
    result: Json = {
        "lo": shorts(by_step.lo[order]),
        "hi": shorts(by_step.hi[order]),
        "quantiles": [shorts(row[order]) for row in quantiles(by_step, LEVELS)],
        "magnitude": shorts(magnitude(by_step)[order]),
    }
    if activation.by_class is not None:
        ends = quantiles(activation.by_class, (LEVELS[0], LEVELS[-1])).unflatten(1, (-1, len(order)))
        result["by_class"] = {
            key: [shorts(row[order]) for row in rows] for key, rows in zip(("low", "high"), ends, strict=True)
        }
    return result


def _subject(subject: Subject, order: Tensor | None, steps: Tensor, searched: dict[tuple[Any, ...], Tensor]) -> Json:
    artifact, measured = subject.artifact, subject.measured
    facts = summarize(artifact)
    shapes = {row["name"]: row["shape"] for row in facts["weights"]}
    histograms = {name: a.by_step for name, a in measured.activations.items()} if measured else {}
    return {
        "name": subject.name,
        **{key: artifact.config[key] for key in ("scheme", "method", "preset", "seed", "choices", "versions")},
        "calibration_set": artifact.config["calibration_set"],
        **{key: facts[key] for key in ("bytes", "fp32_bytes", "file_bytes")},
        "layers": [
            {
                **{key: layer.to_dict()[key] for key in ("name", "kind", "unit", "weight_bits")},
                "shape": shapes.get(layer.name),
                "quantizers": [q.name for q in layer.inputs],
            }
            for layer in artifact.layers
        ],
        "tables": {
            q.name: _table(q, artifact.tables[q.name], histograms.get(q.name), order, steps, searched)
            for q in artifact.quantizers
        },
        "errors": None if measured is None or order is None else _errors(measured.errors, order),
        "latent_sqnr_db": short(measured.latent_sqnr_db) if measured else None,
        "image_psnr_db": short(measured.image_psnr_db) if measured else None,
        "stored": _stored(artifact),
        "reconstruction": artifact.metrics.get("reconstruction"),
    }


def _errors(errors: LayerErrors, order: Tensor) -> Json:
    layers = {key: [shorts(row[order]) for row in getattr(errors, key)] for key in ("inputs", "own", "accumulated")}
    return {**layers, "prediction": shorts(errors.prediction[order])}


def _table(
    quantizer: QuantizerRecord,
    table: IntervalTable,
    histogram: Histogram | None,
    order: Tensor | None,
    steps: Tensor,
    searched: dict[tuple[Any, ...], Tensor],
) -> Json:
    """The interval s(t) and the range [lo, hi]; at the measured steps also the best interval and what is clipped.

    ``searched`` remembers best intervals: artifacts that differ in their seed share them.
    """
    qtype = QType(quantizer.bits)
    result: Json = {"bits": quantizer.bits, "method": quantizer.method}
    best = None
    if histogram is not None and order is not None:
        method = "mse" if quantizer.range_method == "ema" else quantizer.range_method
        case = (id(histogram), quantizer.bits, method, quantizer.from_zero)
        if case not in searched:
            searched[case] = activation_qparams(histogram, qtype, method=method, from_zero=quantizer.from_zero).scale
        best = searched[case][order]
        result["best"] = shorts(best)
    if table.scale is None:
        return result
    scale, zero = table.scale.double(), table.zero_point.double()
    curves = {"scale": scale, "lo": scale * (qtype.qmin - zero), "hi": scale * (qtype.qmax - zero)}
    width = float((scale * (qtype.qmax - qtype.qmin)).max())
    for key, curve in curves.items():
        tolerance = TOLERANCE * (width if key != "scale" else float(scale.max()))
        points = thin(curve, tolerance)
        result[key] = {"t": points.tolist(), "v": shorts(curve[torch.from_numpy(points)])}
    result["varies"] = short(float(scale.max() / scale.min()))
    if histogram is not None and order is not None and best is not None:
        at = lookup(table.scale, steps)
        low, high = (lookup(curve.float(), steps) for curve in (curves["lo"], curves["hi"]))
        result["clipped"] = shorts(clipped(_rows(histogram, order), low - at / 2, high + at / 2), 3)
        result["off"] = short(float(((at / best).log().abs()).mean().exp() - 1), 3)
        result["follows"] = short(correlation(at, best), 3)
    return result


def clipped(histogram: Histogram, low: Tensor, high: Tensor) -> Tensor:
    """Share of values below ``low`` [K] or above ``high`` [K] in each row."""
    x = histogram.centres
    outside = (x < low[:, None]) | (x > high[:, None])
    return (histogram.counts * outside).sum(1) / histogram.counts.sum(1)


def correlation(a: Tensor, b: Tensor) -> float | None:
    """Pearson's correlation of the logarithms of two positive curves [K]; None where one of them hardly varies (5%)."""
    if min(float(x.max() / x.min()) for x in (a, b)) < 1.05:
        return None
    return float(np.corrcoef(a.double().log().numpy(), b.double().log().numpy())[0, 1])


def _rows(histogram: Histogram, order: Tensor) -> Histogram:
    return Histogram(histogram.counts[order], histogram.centres, histogram.lo[order], histogram.hi[order])


def _stored(artifact: Artifact) -> Json | None:
    """What ``calibrate`` measured: the final latents and each step, with the learned and with static intervals."""
    metrics = artifact.metrics
    if not all(isinstance(metrics.get(key), dict) for key in ("learned", "static")):
        return None
    result: Json = {"samples": metrics.get("samples")}
    for key in ("learned", "static"):
        by_step = sorted((float(t), value) for t, value in metrics[key].get("noise_sqnr_db", {}).items())
        result[key] = {
            "latent_sqnr_db": metrics[key].get("latent_sqnr_db"),
            "mean_noise_sqnr_db": metrics[key].get("mean_noise_sqnr_db"),
            "t": [t for t, _ in by_step],
            "v": [short(value) for _, value in by_step],
        }
    return result


def _name(identifier: str) -> str:
    """A model id without the folders of the machine that it was read on."""
    is_path = identifier.startswith((".", "/", "~")) or "\\" in identifier or identifier.count("/") > 1
    return identifier.replace("\\", "/").rstrip("/").split("/")[-1] if is_path else identifier
