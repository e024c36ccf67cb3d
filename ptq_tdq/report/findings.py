"""What a reader should take away from the numbers of a report, as sentences; each only where its numbers exist."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from statistics import mean, median
from typing import Any

import numpy as np

Json = dict[str, Any]
FOLLOWS = 0.5  # correlation from which an interval is said to follow the activation


def average(values: list[float | None]) -> float | None:
    """Mean of the finite values; None without any."""
    known = [v for v in values if v is not None]
    return mean(known) if known else None


def lowest(values: list[float | None]) -> int | None:
    """Index of the lowest finite value."""
    known = [(v, i) for i, v in enumerate(values) if v is not None]
    return min(known)[1] if known else None


def worst_layers(artifact: Json, kind: str = "own") -> list[tuple[str, float]]:
    """Layers and the mean SQNR over the steps, lowest first; empty without measurements."""
    if not artifact["errors"]:
        return []
    rows = zip(artifact["layers"], artifact["errors"][kind], strict=True)
    means = [(layer["name"], average(row)) for layer, row in rows]
    return sorted([(name, value) for name, value in means if value is not None], key=lambda pair: pair[1])


def findings(data: Json, artifact: Json) -> list[tuple[str, list[str]]]:
    """Questions that a reader has about one artifact of the report, each with its answer in sentences."""
    answers = [
        (question, [s for part in parts for s in part(data, artifact)]) for question, parts in _QUESTIONS.items()
    ]
    return [(question, sentences) for question, sentences in answers if sentences]


def _samples(data: Json, artifact: Json) -> Iterator[str]:
    stored, latent = artifact["stored"], artifact["latent_sqnr_db"]
    if latent is not None:
        yield (
            f"The final latents end {latent:.1f} dB above their error, which holds {_share(latent)} of the signal's "
            f"energy ({data['samples']} samples, {len(data['steps'])} steps)."
        )
    if stored and all(stored[key]["latent_sqnr_db"] is not None for key in ("learned", "static")):
        gain = stored["learned"]["latent_sqnr_db"] - stored["static"]["latent_sqnr_db"]
        word = "gain" if gain >= 0 else "lose"
        yield (
            f"At calibration the learned intervals {word} {abs(gain):.2f} dB in the final latents against static ones "
            f"that are not learned ({stored['samples']} samples)."
        )


def _where(data: Json, artifact: Json) -> Iterator[str]:
    errors, worst = artifact["errors"], worst_layers(artifact)[:3]
    if not errors:
        return
    if worst:
        yield f"By themselves these layers lose most: {_list([f'{name} ({v:.1f} dB)' for name, v in worst])}."
    pairs = [
        (average(errors["inputs"][i]), average(errors["own"][i]))
        for i, layer in enumerate(artifact["layers"])
        if layer["weight_bits"] is not None
    ]
    known = [(a, b) for a, b in pairs if a is not None and b is not None]
    by_weights = sum(a - b > 3.01 for a, b in known)  # half of the error or more
    yield f"Rounding the weights costs more than rounding the activations in {by_weights} of {len(known)} layers."
    prediction = errors["prediction"]
    low, high = lowest(prediction), lowest([None if v is None else -v for v in prediction])
    if low is not None and high is not None:
        yield (
            f"Over t the predicted noise is worst at t = {data['steps'][low]:g} ({prediction[low]:.1f} dB) and best at "
            f"t = {data['steps'][high]:g} ({prediction[high]:.1f} dB)."
        )


def _following(data: Json, artifact: Json) -> Iterator[str]:
    tables = [t for t in artifact["tables"].values() if t.get("varies") is not None and t["method"] != "fixed"]
    if not tables:
        yield "There are no interval tables: every interval is found at run time."
        return
    varies = median(t["varies"] for t in tables)
    if varies < 1.005:
        yield "The intervals are the same at every t."
    else:
        yield f"The intervals vary {varies:.2f}x over t (median of {len(tables)} activations)."
    told = [t["follows"] for t in tables if t.get("follows") is not None]
    if told:
        yield (
            f"{sum(r > FOLLOWS for r in told)} of {len(told)} follow the activation: their correlation with the best "
            f"interval of each step is above {FOLLOWS}."
        )
    off = [t["off"] for t in tables if t.get("off") is not None]
    if off:
        yield (
            f"They are {median(off):.0%} off that best interval (median). Some distance is meant: intervals are "
            "learned for the output of their block."
        )


def _classes(data: Json, artifact: Json) -> Iterator[str]:
    over_t, over_classes = [], []
    for activation in data["activations"].values():
        if "by_class" in activation:
            low, high = (np.array(activation["by_class"][key], float) for key in ("low", "high"))
            width = high - low  # [C, K]
            if np.isfinite(width).all() and (width > 0).all() and len(width) > 1:
                over_t.append(float(np.median(width.max(1) / width.min(1))))
                over_classes.append(float(np.median(width.max(0) / width.min(0))))
    if over_t:
        yield (
            f"The spread of an activation changes {median(over_t):.2f}x over t within a class, and "
            f"{median(over_classes):.2f}x between classes at one t (medians): an interval can follow the first only."
        )


_QUESTIONS: dict[str, tuple[Callable[[Json, Json], Iterator[str]], ...]] = {
    "What is lost, and where?": (_samples, _where),
    "Did the intervals follow the activations?": (_following, _classes),
}


def checks(data: Json, artifact: Json) -> list[tuple[str, str]]:
    """Reasons to trust the artifact, or not: ("ok" | "warn" | "unknown", sentence)."""
    found = [("ok", "Every file has the hash that was written, and tables, weights and layers fit together.")]
    measured = artifact["errors"] is not None
    found.append(
        ("ok", "The full-precision model beside it is the one that was quantized (SHA-256).")
        if measured
        else ("unknown", "Not compared with the full-precision model for this page.")
    )
    stored, latent = artifact["stored"], artifact["latent_sqnr_db"]
    if stored and stored["learned"]["latent_sqnr_db"] is not None and latent is not None:
        there = stored["learned"]["latent_sqnr_db"]
        state = "ok" if abs(latent - there) < 3 else "warn"
        found.append(
            (state, f"Final latents: {latent:.1f} dB here on {data['samples']} samples, {there:.1f} dB at calibration "
                    f"on {stored['samples']}.")
        )  # fmt: skip
    elif not stored:
        found.append(("unknown", "The artifact holds no measurement from calibration to compare with."))
    # a UNet2DModel's first convolution; it is missing here where it was skipped
    first: Json = next((layer for layer in artifact["layers"] if layer["name"] == "conv_in"), {})
    quantizers = first.get("quantizers")
    clipped = (artifact["tables"][quantizers[0]].get("clipped") or []) if quantizers else []
    shares = [v for v in clipped if v is not None]
    if not quantizers:
        found.append(("ok", "The model's own input x_t is not quantized."))
    elif shares:
        share = max(shares)
        found.append(
            ("ok", "The model's own input x_t is never clipped.")
            if share == 0
            else ("warn", f"The model's own input x_t is clipped (up to {share:.2%} of its values); such errors add up "
                          "along a trajectory.")
        )  # fmt: skip
    losses = artifact["reconstruction"]
    if losses:
        units = [u for phase in losses.values() for u in phase if None not in (u["before"], u["after"])]
        worse = [u["unit"] for u in units if u["after"] > u["before"]]
        choices = artifact["choices"]
        again = choices["rounding"] == "gptq" and choices.get("round_again")
        learned = "learned intervals and the second rounding" if again else "learned intervals"
        cuts = [
            f"{what} cut it by {median([1 - u['after'] / u['before'] for u in known]):.0%}"
            for phase, what in (("weights", "rounding"), ("activations", learned))
            if (known := [u for u in losses.get(phase, []) if u["before"] and u["after"] is not None])
        ]
        found.append(
            (
                "ok",
                f"No block ended with a higher loss than it began with; {_list(cuts)} (medians)."
                if cuts
                else "No block ended with a higher loss than it began with.",
            )
            if not worse
            else ("warn", f"These blocks ended with a higher loss than they began with: {_list(worse)}.")
        )
    else:
        found.append(("unknown", "Reconstruction losses are not in this artifact; calibrate again to have them."))
    return found


def seeds(data: Json) -> list[list[int]]:
    """Groups of artifacts that differ in nothing but their seed, by position."""
    groups: dict[str, list[int]] = {}
    for i, artifact in enumerate(data["artifacts"]):
        same = {key: value for key, value in artifact["choices"].items() if key != "seed"}
        groups.setdefault(repr(sorted(same.items())), []).append(i)
    return [g for g in groups.values() if len({data["artifacts"][i]["seed"] for i in g}) > 1]


def spread(data: Json) -> str | None:
    """How much the intervals of several seeds differ, as a sentence; None without such artifacts."""
    found = []
    for group in seeds(data):
        tables = [data["artifacts"][i]["tables"] for i in group]
        t = np.linspace(0, data["num_train_timesteps"] - 1, 101)
        for name in tables[0]:
            curves = [table[name].get("scale") for table in tables if name in table]
            if len(curves) == len(group) and all(curves):
                s = np.array([np.interp(t, c["t"], c["v"]) for c in curves if c])
                found.append(float((s.std(0, ddof=1) / s.mean(0)).mean()))
    if not found:
        return None
    return f"Between seeds, an interval deviates by {median(found):.1%} of its mean (median over the activations)."


def _share(db: float) -> str:
    return f"{10 ** (-db / 10):.2g}".rstrip() if db > 30 else f"{10 ** (-db / 10):.1%}"


def _list(items: list[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
