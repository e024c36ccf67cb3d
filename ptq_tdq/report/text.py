"""Numbers of an artifact as the page writes them."""

from __future__ import annotations

from typing import Any

from ptq_tdq.report.findings import average

Json = dict[str, Any]
UNKNOWN = "\N{EN DASH}"


def number(value: float | None) -> str:
    """A measured value without its unit."""
    return UNKNOWN if value is None else f"{value:.1f}"


def decibels(value: float | None) -> str:
    """A measured value."""
    return UNKNOWN if value is None else f"{value:.1f} dB"


def signed(value: float | None, unit: str, digits: int = 1) -> str:
    """A difference, with a true minus sign."""
    return UNKNOWN if value is None else f"{value:+z.{digits}f} {unit}".replace("-", "\N{MINUS SIGN}")


def choice_text(of: object) -> str:
    """A choice."""
    return ", ".join(map(str, of)) or "none" if isinstance(of, list) else UNKNOWN if of is None else str(of)


def latents_db(artifact: Json) -> float | None:
    """SQNR (dB) of the end of the way: what was measured for the page, else at calibration."""
    found: float | None = artifact["latent_sqnr_db"]
    return artifact["stored"]["learned"]["latent_sqnr_db"] if found is None and artifact["stored"] else found


def prediction_db(artifact: Json) -> float | None:
    """SQNR (dB) of single predictions, mean over the steps."""
    if artifact["errors"]:
        return average(artifact["errors"]["prediction"])
    return artifact["stored"]["learned"]["mean_noise_sqnr_db"] if artifact["stored"] else None


def calibration_rows(stored: Json) -> list[tuple[str, str]]:
    """What the calibration set was made with: the pipeline's arguments one by one, prompts as their number."""
    flat = {**stored, **(stored["call"] if isinstance(stored.get("call"), dict) else {})}
    if isinstance(flat.get("prompts"), list):
        flat["prompts"] = len(flat["prompts"])
    left_out = ("call", "model_sha256", "scheduler_sha256")
    return [(name, choice_text(of)) for name, of in flat.items() if name not in left_out and of is not None]
