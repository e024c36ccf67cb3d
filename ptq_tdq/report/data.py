"""The numbers of a report as plain JSON data: what the page embeds, and what the figures are drawn from.

Steps are in ascending order of t, whatever the order of the sampler. Curves over all t = 0 to T are thinned to
``{"t": [...], "v": [...]}``, within 0.3% of their quantizer's range.
"""

from __future__ import annotations

from importlib.metadata import version
from textwrap import shorten
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ptq_tdq.artifacts import Artifact, IntervalTable, public_name, summarize
from ptq_tdq.choices import ungrouped
from ptq_tdq.config import Role
from ptq_tdq.evaluate.images import captions_of
from ptq_tdq.evaluate.trajectories import Reference
from ptq_tdq.records import QuantizerRecord
from ptq_tdq.report.curves import magnitude, quantiles, short, shorts, thin
from ptq_tdq.report.measure import Activation, LayerErrors, groups_of
from ptq_tdq.report.survey import PICTURES, Subject, Survey
from ptq_tdq.scheme import QType
from ptq_tdq.search import Histogram, activation_qparams
from ptq_tdq.timeaxis import lookup

LEVELS = (0.01, 0.25, 0.5, 0.75, 0.99)  # quantiles of the distributions
LETTERS = 40  # letters of a prompt
TOLERANCE = 0.003  # of a quantizer's range: how far a thinned curve may be off

Json = dict[str, Any]


def report_data(found: Survey) -> Json:
    """Everything that the page shows but its pictures, by the names that ``page.js`` uses."""
    first, reference = found.subjects[0].artifact, found.reference
    steps = torch.empty(0) if reference is None else reference.calls.t.unique()
    activations: Json = {}
    for subject in found.subjects:
        for name, activation in (subject.measured.activations if subject.measured else {}).items():
            if name not in activations:
                activations[name] = _activation(activation)
    base = first.config["base_model"]
    searched: dict[tuple[Any, ...], Tensor] = {}
    return {
        "version": version("ptq-tdq"),
        "model": {
            **base,
            "id": public_name(base["id"]),
            "class": first.config["model_config"].get("_class_name"),
            "pipeline": _pipeline(first.config["calibration_set"].get("sampler")),
        },
        "num_train_timesteps": first.num_train_timesteps,
        "steps": shorts(steps, 6),
        "samples": 0 if reference is None else len(reference.latents),
        "end": "latents" if reference is not None and _has_latents(reference) else "samples",
        "scheduler": None if reference is None else type(reference.model.scheduler).__name__,
        "seed": found.seed,
        "groups": [] if reference is None else [_shortened(text) for text in captions_of(groups_of(reference))],
        "condition": _kind(reference),
        "levels": list(LEVELS),
        "pictures": PICTURES,
        "activations": activations,
        "artifacts": [_subject(subject, steps, found.roles, searched) for subject in found.subjects],
        "notices": list(found.notices),
    }


def _pipeline(sampler: Any) -> str | None:
    """The class whose sampling was recorded, if it was a pipeline."""
    return sampler if isinstance(sampler, str) and sampler != "loop" else None


def _has_latents(reference: Reference) -> bool:
    """Whether something else than the end of the way is what one looks at."""
    return reference.images is None or reference.images.shape != reference.latents.shape


def _kind(reference: Reference | None) -> str | None:
    """What the samples are conditioned on."""
    condition = None if reference is None else reference.conditions[0]
    return None if condition is None else "prompt" if isinstance(condition, str) else "class"


def _shortened(text: str) -> str:
    return shorten(text, LETTERS, placeholder="\N{HORIZONTAL ELLIPSIS}")


def _activation(activation: Activation) -> Json:
    by_step = activation.by_step
    result: Json = {
        "lo": shorts(by_step.lo),
        "hi": shorts(by_step.hi),
        "quantiles": [shorts(row) for row in quantiles(by_step, LEVELS)],
        "magnitude": shorts(magnitude(by_step)),
    }
    if activation.by_group is not None:
        ends = quantiles(activation.by_group, (LEVELS[0], LEVELS[-1])).unflatten(1, (-1, len(by_step.lo)))
        result["by_group"] = {
            key: [shorts(row) for row in rows] for key, rows in zip(("low", "high"), ends, strict=True)
        }
    return result


def _subject(
    subject: Subject, steps: Tensor, roles: dict[str, set[Role]], searched: dict[tuple[Any, ...], Tensor]
) -> Json:
    artifact, measured = subject.artifact, subject.measured
    facts = summarize(artifact)
    shapes = {row["name"]: row["shape"] for row in facts["weights"]}
    histograms = {name: a.by_step for name, a in measured.activations.items()} if measured else {}
    return {
        "name": subject.name,
        **{key: artifact.config[key] for key in ("scheme", "method", "preset", "seed", "versions")},
        "choices": ungrouped(artifact.config["choices"]),
        "calibration_set": artifact.config["calibration_set"],
        **{
            key: facts[key]
            for key in ("bytes", "fp32_bytes", "file_bytes", "time_axis", "coverage", "notices", "choice")
        },
        "layers": [
            {
                **{key: layer.to_dict()[key] for key in ("name", "kind", "unit", "weight_bits")},
                "shape": shapes.get(layer.name),
                "roles": sorted(roles.get(layer.name, ())),
                "quantizers": [q.name for q in layer.inputs],
            }
            for layer in artifact.layers
        ],
        "tables": {
            q.name: _table(q, artifact.tables[q.name], histograms.get(q.name), steps, searched)
            for q in artifact.quantizers
        },
        "errors": _errors(measured.errors) if measured else None,
        "latent_sqnr_db": short(measured.latent_sqnr_db) if measured else None,
        "image_psnr_db": short(measured.image_psnr_db) if measured else None,
        "stored": _stored(artifact),
        "reconstruction": artifact.metrics.get("reconstruction"),
        "finetune": _finetune(artifact),
    }


def _errors(errors: LayerErrors) -> Json:
    layers = {key: [shorts(row) for row in getattr(errors, key)] for key in ("inputs", "own", "accumulated")}
    return {**layers, "prediction": shorts(errors.prediction)}


def _table(
    quantizer: QuantizerRecord,
    table: IntervalTable,
    histogram: Histogram | None,
    steps: Tensor,
    searched: dict[tuple[Any, ...], Tensor],
) -> Json:
    """The interval s(t) and the range [lo, hi]; at the measured steps also the best interval and what is clipped.

    ``searched`` remembers best intervals: artifacts that differ in their seed share them.
    """
    qtype = QType(quantizer.bits)
    result: Json = {"bits": quantizer.bits, "method": quantizer.method}
    best = None
    if histogram is not None:
        method = "mse" if quantizer.range_method == "ema" else quantizer.range_method
        case = (id(histogram), quantizer.bits, method, quantizer.from_zero)
        if case not in searched:
            searched[case] = activation_qparams(histogram, qtype, method=method, from_zero=quantizer.from_zero).scale
        best = searched[case]
        seen = histogram.counts.sum(1) > 0  # an expert may have nothing to do at some steps
        result["best"] = shorts(torch.where(seen, best, torch.nan))
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
    if histogram is not None and best is not None:
        at = lookup(table.scale, steps)
        low, high = (lookup(curve.float(), steps) for curve in (curves["lo"], curves["hi"]))
        result["clipped"] = shorts(clipped(histogram, low - at / 2, high + at / 2), 3)
        at, best = at[seen], best[seen]
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


def _stored(artifact: Artifact) -> Json | None:
    """What ``calibrate`` measured: the end of the way and each step, with the learned and with static intervals."""
    metrics = artifact.metrics
    if not metrics.keys() >= {"learned", "static"}:
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


def _finetune(artifact: Artifact) -> Json | None:
    """How it was fine-tuned: the loss on held-out samples before and after, and that over the iterations."""
    about, found = artifact.config.get("finetune"), artifact.metrics.get("finetune")
    if not about or not found:
        return None
    losses = {"t": [x["iteration"] for x in found["losses"]], "v": [short(x["loss"]) for x in found["losses"]]}
    return {**found["held_out"], "quantizer": about["choices"].get("quantizer"), "losses": losses}
