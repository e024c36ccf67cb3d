"""The HTML page: one file with its data, styles and scripts inside, which opens without a network."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import DictLoader, Environment, StrictUndefined
from markupsafe import Markup, escape
from PIL import Image

from ptq_tdq.files import size_text
from ptq_tdq.report.beside import beside
from ptq_tdq.report.findings import checks, findings, lowest, plural, seeds, spread, worst_layers
from ptq_tdq.report.text import (
    UNKNOWN,
    calibration_rows,
    choice_text,
    decibels,
    latents_db,
    number,
    prediction_db,
)

Json = dict[str, Any]
FAMILY = ("id", "pipeline", "component", "class")
PHASES = {"weights": "Rounding of weights", "activations": "Intervals of activations"}


def render_page(data: Json, pictures: dict[str, Image.Image]) -> str:
    """The page of :func:`~ptq_tdq.report.data.report_data`; ``pictures`` by caption, full precision first."""
    page, groups = _environment().get_template("page.html"), seeds(data)
    return page.render(
        title=", ".join(a["name"] for a in data["artifacts"]),
        json=_embedded({**data, "seed_groups": groups}),
        version=data["version"],
        model=data["model"],
        model_line=" \N{MIDDLE DOT} ".join(str(part) for key in FAMILY if (part := data["model"].get(key))),
        notices=data["notices"],
        artifacts=[_artifact(data, artifact) for artifact in data["artifacts"]],
        differences=[beside(data, data["artifacts"][0], other) for other in data["artifacts"][1:]],
        sections=_sections(data, pictures, groups),
        steps_text=_steps_text(data),
        seeds=spread(data),
        end=data["end"],
        conditions=plural(data["condition"]) if data["condition"] else None,
        pictures=[_picture(data, i, name, image) for i, (name, image) in enumerate(pictures.items())],
    )


@cache
def _environment() -> Environment:
    """The templates, with the styles and scripts that they embed."""
    parts = files("ptq_tdq.report").joinpath("templates")
    read = {path.name: path.read_text(encoding="utf-8") for path in parts.iterdir() if path.is_file()}
    environment = Environment(loader=DictLoader(read), autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters["breakable"] = _breakable
    environment.globals["files"] = read
    return environment


def _sections(data: Json, pictures: dict[str, Image.Image], groups: list[list[int]]) -> dict[str, str]:
    """The sections that there is something for, with their headings."""
    artifacts = data["artifacts"]
    measured = any(a["errors"] for a in artifacts)
    sections = {
        "summary": "Summary",
        "differences": len(artifacts) > 1 and "Differences",
        "steps": (measured or any(a["stored"] for a in artifacts)) and "Error over t",
        "map": measured and "Heat map",
        "layers": "Layers",
        "seeds": bool(groups) and "Seeds",
        "samples": bool(pictures) and "Samples",
        "finetune": any(a["finetune"] for a in artifacts) and "Fine-tuning",
        "losses": "Losses",
        "made": "How it was made",
    }
    return {key: text for key, text in sections.items() if text}


def _breakable(text: str) -> Markup:
    """Text whose layer names may break after their dots, and whose numbers stay with their unit."""
    whole = re.sub(r"(?<=\d) (?=dB\b)", "\N{NO-BREAK SPACE}", text)
    return Markup(re.sub(r"(?<=[a-z_]\.)|(?<=\d\.)(?=[a-z_])", "<wbr>", escape(whole)))


def _embedded(data: Json) -> str:
    """JSON for a script element, which ends at the first "</"."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _artifact(data: Json, artifact: Json) -> Json:
    return {
        **{key: artifact[key] for key in ("name", "scheme", "method", "preset", "seed", "finetune")},
        "tiles": _tiles(data, artifact),
        "findings": findings(data, artifact),
        "checks": checks(data, artifact),
        "size": size_text(artifact["bytes"]),
        "latent": decibels(latents_db(artifact)),
        "psnr": decibels(artifact["image_psnr_db"]),
        "prediction": decibels(prediction_db(artifact)),
        "losses": [
            {"title": PHASES.get(phase, phase), "units": _losses(units)}
            for phase, units in sorted((artifact["reconstruction"] or {}).items(), reverse=True)
        ],
        "files": [(name, size_text(size)) for name, size in artifact["file_bytes"].items()],
        "versions": ", ".join(f"{name} {version}" for name, version in sorted(artifact["versions"].items())),
        "axis": artifact["time_axis"]["text"],
        "calibration": calibration_rows(artifact["calibration_set"]),
        "choices": [(name, choice_text(of)) for name, of in artifact["choices"].items()],
    }


def _steps_text(data: Json) -> str:
    kept = sorted({a["stored"]["samples"] for a in data["artifacts"] if a["stored"] and a["stored"]["samples"]})
    here = any(a["errors"] and not a["stored"] for a in data["artifacts"])
    said = [f"at calibration on {' or '.join(map(str, kept))} samples"] if kept else []
    said += [f"here on {data['samples']} samples"] if here else []
    return f"Measured {', else '.join(said)}." if said else ""


def _tiles(data: Json, artifact: Json) -> list[dict[str, str]]:
    stored, errors = artifact["stored"], artifact["errors"]
    latent, where = artifact["latent_sqnr_db"], f"{data['samples']} samples, SQNR against full precision"
    if latent is None and stored:
        latent, where = stored["learned"]["latent_sqnr_db"], f"{stored['samples']} samples, measured at calibration"
    tiles = [_tile(f"Final {data['end']}", number(latent), "dB", where if latent is not None else "not measured")]
    prediction = prediction_db(artifact)
    how = "not measured" if prediction is None else "SQNR, mean over the steps"
    tiles.append(_tile("Prediction", number(prediction), "dB", how))
    if errors:
        worst = worst_layers(artifact)
        if worst:
            tiles.append(_tile("Layer that loses most", number(worst[0][1]), "dB", worst[0][0]))
        k = lowest(errors["prediction"])
        if k is not None:
            tiles.append(_tile("Worst step", f"t = {data['steps'][k]:.4g}", "", f"{errors['prediction'][k]:.1f} dB"))
    ratio = artifact["fp32_bytes"] / artifact["bytes"]
    compared = f"{ratio:.1f}x smaller" if ratio >= 1 else f"{1 / ratio:.1f}x larger"  # tables of a tiny model
    size, unit = size_text(artifact["bytes"]).split(" ")
    tiles.append(_tile("Size", size, unit, f"{compared} than {size_text(artifact['fp32_bytes'])} in float32"))
    return tiles


def _tile(label: str, value: str, unit: str, hint: str) -> dict[str, str]:
    return {"label": label, "value": value, "unit": unit if value != UNKNOWN else "", "hint": hint}


def _losses(units: list[Json]) -> list[Json]:
    """Places (percent) of the losses of each unit on a common logarithmic axis."""
    values = [u[key] for u in units for key in ("before", "after") if u[key]]
    if not values:
        return []
    low, high = math.log(min(values)), math.log(max(values))

    def place(value: float | None) -> float:
        return 100 * (math.log(value) - low) / ((high - low) or 1) if value else 0.0

    rows = []
    for u in units:
        start, end = place(u["before"]), place(u["after"])
        known = u["before"] and u["after"] is not None
        rows.append(
            {
                "unit": u["unit"],
                "before": "overflow" if u["before"] is None else f"{u['before']:.4g}",
                "after": "overflow" if u["after"] is None else f"{u['after']:.4g}",
                "start": f"{start:.2f}", "end": f"{end:.2f}",
                "left": f"{min(start, end):.2f}", "width": f"{abs(start - end):.2f}",
                "cut": f"{u['after'] / u['before'] - 1:+.0%}".replace("-", "\N{MINUS SIGN}") if known else UNKNOWN,
            }
        )  # fmt: skip
    return rows


def _picture(data: Json, index: int, name: str, image: Image.Image) -> Json:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    text = ""
    if index:
        artifact = data["artifacts"][index - 1]
        text = f"{artifact['scheme']}, {artifact['method']}; images {decibels(artifact['image_psnr_db'])} PSNR"
    uri = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
    count = min(data["samples"], data["pictures"])
    return {"name": name, "uri": uri, "text": text, "width": image.width, "height": image.height, "count": count}
