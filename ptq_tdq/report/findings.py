"""What a reader should take away from the numbers of a report, as sentences; each only where its numbers exist."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from statistics import mean, median
from typing import Any

import numpy as np

Json = dict[str, Any]
Check = tuple[str, str]  # ("ok" | "warn" | "unknown", sentence)
FOLLOWS = 0.5  # correlation from which an interval is said to follow the activation


def average(values: list[float | None]) -> float | None:
    """Mean of the finite values; None without any."""
    known = [v for v in values if v is not None]
    return mean(known) if known else None


def lowest(values: list[float | None]) -> int | None:
    """Index of the lowest finite value."""
    known = [(v, i) for i, v in enumerate(values) if v is not None]
    return min(known)[1] if known else None


def worst_layers(artifact: Json) -> list[tuple[str, float]]:
    """Layers and the mean of their own SQNR over the steps, lowest first; empty without measurements."""
    if not artifact["errors"]:
        return []
    rows = zip(artifact["layers"], artifact["errors"]["own"], strict=True)
    means = [(layer["name"], average(row)) for layer, row in rows]
    return sorted([(name, value) for name, value in means if value is not None], key=lambda pair: pair[1])


def findings(data: Json, artifact: Json) -> list[tuple[str, list[str]]]:
    """Questions that a reader has about one artifact of the report, each with its answer in sentences."""
    answers = [
        (question, [s for part in parts for s in part(data, artifact)]) for question, parts in _QUESTIONS.items()
    ]
    return [(question, sentences) for question, sentences in answers if sentences]


def _coverage(data: Json, artifact: Json) -> Iterator[str]:
    if artifact["coverage"] is not None:
        yield (f"Quantized layers do {100 * artifact['coverage']:.4g}% of the multiply-accumulates with weights.")
    weighted = [layer for layer in artifact["layers"] if layer["weight_bits"] is not None]
    float_input = sum(not layer["quantizers"] for layer in weighted)
    yield (
        f"{_count(len(weighted), 'layer')} {'has' if len(weighted) == 1 else 'have'} quantized weights"
        + (f", {float_input} of them with inputs in floating point." if float_input else ".")
    )
    products = len(artifact["layers"]) - len(weighted)
    if products:
        yield f"{_count(products, 'attention product')} {'is' if products == 1 else 'are'} quantized."
    elif not artifact["choices"].get("attention", True):
        yield "Attention products stay in floating point, as it was chosen."


def _in_floating_point(data: Json, artifact: Json) -> Iterator[str]:
    yield from artifact["notices"]


def _samples(data: Json, artifact: Json) -> Iterator[str]:
    stored, latent = artifact["stored"], artifact["latent_sqnr_db"]
    if latent is not None:
        yield (
            f"The final {data['end']} end {latent:.1f} dB above their error, which holds {_share(latent)} of the "
            f"signal's energy ({data['samples']} samples, {len(data['steps'])} steps)."
        )
    if stored and all(stored[key]["latent_sqnr_db"] is not None for key in ("learned", "static")):
        gain = stored["learned"]["latent_sqnr_db"] - stored["static"]["latent_sqnr_db"]
        word = "gain" if gain >= 0 else "lose"
        yield (
            f"At calibration the learned intervals {word} {abs(gain):.2f} dB in the final {data['end']} against static "
            f"ones that are not learned ({stored['samples']} samples)."
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
            f"Over t the prediction is worst at t = {data['steps'][low]:.4g} ({prediction[low]:.1f} dB) and best at "
            f"t = {data['steps'][high]:.4g} ({prediction[high]:.1f} dB)."
        )


def _following(data: Json, artifact: Json) -> Iterator[str]:
    tables = [t for t in artifact["tables"].values() if t.get("varies") is not None and t["method"] != "fixed"]
    if not tables:
        yield "There are no interval tables: every interval is found at run time."
        return
    if artifact["choice"]:
        yield artifact["choice"]
    moving = [t["varies"] for t in tables if t["varies"] >= 1.005]
    if moving:
        yield f"{len(moving)} of {len(tables)} intervals vary over t, by {median(moving):.2f}x (median)."
    else:
        yield "The intervals are the same at every t."
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
            "learned for the output of their unit."
        )


def _groups(data: Json, artifact: Json) -> Iterator[str]:
    over_t, over_groups = [], []
    for activation in data["activations"].values():
        if "by_group" in activation:
            low, high = (np.array(activation["by_group"][key], float) for key in ("low", "high"))
            width = high - low  # [G, K]
            if np.isfinite(width).all() and (width > 0).all() and len(width) > 1:
                over_t.append(float(np.median(width.max(1) / width.min(1))))
                over_groups.append(float(np.median(width.max(0) / width.min(0))))
    if over_t:
        one, several = data["condition"], plural(data["condition"])
        yield (
            f"The spread of an activation changes {median(over_t):.2f}x over t within a {one}, and "
            f"{median(over_groups):.2f}x between {several} at one t (medians): an interval can follow the first only."
        )


_QUESTIONS: dict[str, tuple[Callable[[Json, Json], Iterator[str]], ...]] = {
    "What is quantized?": (_coverage, _in_floating_point),
    "What is lost, and where?": (_samples, _where),
    "Did the intervals follow the activations?": (_following, _groups),
}


def checks(data: Json, artifact: Json) -> list[Check]:
    """Reasons to trust the artifact, or not."""
    return [check for part in _CHECKS for check in part(data, artifact)]


def _files(data: Json, artifact: Json) -> Iterator[Check]:
    yield "ok", "Every file has the hash that was written, and tables, weights and layers fit together."


def _original(data: Json, artifact: Json) -> Iterator[Check]:
    if artifact["errors"] is None:
        yield "unknown", "Not compared with the full-precision model for this page."
    else:
        yield "ok", "The full-precision model beside it is the one that was quantized (SHA-256)."


def _calibration(data: Json, artifact: Json) -> Iterator[Check]:
    """Whether what was measured here is what was measured at calibration."""
    stored, here = artifact["stored"], artifact["latent_sqnr_db"]
    if not stored:
        yield "unknown", "The artifact holds no measurement from calibration to compare with."
        return
    there = stored["learned"]["latent_sqnr_db"]
    if there is not None and here is not None:
        yield (
            "ok" if abs(here - there) < 3 else "warn",
            f"Final {data['end']}: {here:.1f} dB here on {data['samples']} samples, {there:.1f} dB at calibration "
            f"on {stored['samples']}.",
        )


def _input(data: Json, artifact: Json) -> Iterator[Check]:
    """What happens to x_t, in the layer that takes it."""
    if not any(layer["roles"] for layer in artifact["layers"]):
        return  # which one that is has not been seen
    first: Json = next((layer for layer in artifact["layers"] if "first" in layer["roles"]), {"quantizers": []})
    if not first["quantizers"]:
        yield "ok", "The model's own input x_t is not quantized."
        return
    tables = [artifact["tables"][name] for name in first["quantizers"]]
    shares = [share for table in tables for share in table.get("clipped") or [] if share is not None]
    if shares and max(shares):
        yield (
            "warn",
            f"The model's own input x_t is clipped (up to {max(shares):.2%} of its values); such errors add up along a "
            "trajectory.",
        )
    elif shares:
        yield "ok", "The model's own input x_t is never clipped."


def _losses(data: Json, artifact: Json) -> Iterator[Check]:
    phases = artifact["reconstruction"]
    if not phases:
        yield "unknown", "Reconstruction losses are not in this artifact; calibrate again to have them."
        return
    known = [u for units in phases.values() for u in units if None not in (u["before"], u["after"])]
    worse = [u["unit"] for u in known if u["after"] > u["before"]]
    if worse:
        yield "warn", f"These units ended with a higher loss than they began with: {_list(worse)}."
        return
    choices = artifact["choices"]
    again = choices["rounding"] == "learned" or (choices["rounding"] == "gptq" and choices.get("round_again"))
    learned = "learned intervals and the last rounding" if again else "learned intervals"
    cuts = [
        f"{what} cut it by {median(shares):.0%}"
        for phase, what in (("weights", "rounding"), ("activations", learned))
        if (shares := _cuts(phases.get(phase, [])))
    ]
    said = f"; {_list(cuts)} (medians)." if cuts else "."
    yield "ok", f"No unit ended with a higher loss than it began with{said}"


def _cuts(units: list[Json]) -> list[float]:
    """Shares of the losses that are gone at the end."""
    return [1 - u["after"] / u["before"] for u in units if u["before"] and u["after"] is not None]


_CHECKS: tuple[Callable[[Json, Json], Iterator[Check]], ...] = (_files, _original, _calibration, _input, _losses)


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
        t = np.linspace(0, data["num_train_timesteps"], 101)
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


def plural(word: str) -> str:
    """Of a regular noun."""
    return f"{word}es" if word.endswith("s") else f"{word}s"


def _count(number: int, word: str) -> str:
    return f"{number} {word if number == 1 else plural(word)}"


def _list(items: list[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
