"""The figures as files, for papers and slides: PNG and SVG of the first artifact, and of several where they compare.

The TDQ supplement's figures: 1 (seeds), 2 and 3 (intervals), 4 (distribution over t), 5 (classes, or prompts).
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ptq_tdq.report.findings import seeds

Json = dict[str, Any]
SHOWN = 12  # activations in most figures: those whose interval varies most
MOST = 72  # activations in the figure of all intervals; large models have a thousand
LEARNED, BEST, PLAIN, BAND = "#2563c9", "#d9730d", "#7a8190", "#8fa3bf"
STYLE: Any = {
    **{"font.size": 7, "axes.titlesize": 5.5, "axes.titleweight": "bold", "axes.titley": 1.0, "legend.frameon": False},
    **{"axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6, "axes.edgecolor": PLAIN},
    **{"lines.linewidth": 1.2, "xtick.major.width": 0.6, "ytick.major.width": 0.6, "savefig.dpi": 150},
    **{"svg.hashsalt": "ptq-tdq", "svg.fonttype": "none"},
}


def draw_figures(data: Json) -> Iterator[tuple[str, bytes]]:
    """File names and contents; only the figures whose numbers are there."""
    for name, make in _FIGURES.items():
        with matplotlib.rc_context(STYLE):
            figure = make(data)
            if figure is None:
                continue
            for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
                buffer = io.BytesIO()
                figure.savefig(buffer, format=kind, metadata=metadata)
                yield f"{name}.{kind}", buffer.getvalue()


def _grid(count: int, columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """Axes of ``width`` x ``height`` inches, with fixed margins: an automatic layout of 70 axes takes half a minute."""
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    across, up = columns * width + 0.4, rows * height + 0.75
    figure = Figure(figsize=(across, up))
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    figure.subplots_adjust(
        left=0.4 / across, right=1 - 0.1 / across, bottom=0.55 / up, top=1 - 0.2 / up,
        wspace=0.35 * columns / (columns + 1), hspace=0.35,
    )  # fmt: skip
    for ax in axes:
        ax.locator_params(nbins=4)
    for spare in axes[count:]:
        spare.set_visible(False)
    return figure, axes[:count]


def _most_varying(data: Json, count: int = SHOWN) -> list[str]:
    tables = data["artifacts"][0]["tables"]
    known = [name for name, table in tables.items() if table.get("varies") is not None]
    return sorted(known, key=lambda name: (-tables[name]["varies"], name))[:count]


def _legend(figure: Figure, ax: Axes) -> None:
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=6)


def _intervals(data: Json) -> Figure | None:
    """Learned interval against activation magnitude over t, in execution order (supp Figures 2 and 3)."""
    chosen = set(_most_varying(data, MOST))
    tables = {name: t for name, t in data["artifacts"][0]["tables"].items() if name in chosen}
    if not tables:
        return None
    figure, axes = _grid(len(tables), 6, 2.3, 1.5)
    for ax, (name, table) in zip(axes, tables.items(), strict=True):
        curve, seen = table["scale"], data["activations"].get(name)
        if seen:
            at = np.interp(data["steps"], curve["t"], curve["v"])
            values = np.array(seen["magnitude"], float)
            ax.plot(
                data["steps"], values * at.mean() / values.mean(), "--", color=PLAIN, lw=1, label="mean |x|, scaled"
            )
            ax.plot(data["steps"], table["best"], "o", color=BEST, ms=2, label="best at each step")
        ax.plot(curve["t"], curve["v"], color=LEARNED, label="interval s(t)")
        ax.set_title(name)
        ax.set_ylim(bottom=0)
    _legend(figure, axes[0])
    return figure


def _distribution(data: Json) -> Figure | None:
    """Distribution of activations over t, inside the range that quantization covers (supp Figure 4)."""
    names = [name for name in _most_varying(data) if name in data["activations"]]
    if not names:
        return None
    figure, axes = _grid(len(names), 4, 2.6, 1.8)
    for ax, name in zip(axes, names, strict=True):
        seen, table, t = data["activations"][name], data["artifacts"][0]["tables"][name], data["steps"]
        low, first, middle, third, high = (np.array(row, float) for row in seen["quantiles"])
        bands = (
            ((seen["lo"], seen["hi"]), 0.15, "all"),
            ((low, high), 0.35, "98%"),
            ((first, third), 0.6, "middle half"),
        )
        for (bottom, top), alpha, label in bands:
            ax.fill_between(
                t, np.array(bottom, float), np.array(top, float), color=BAND, alpha=alpha, lw=0, label=label
            )
        ax.plot(t, middle, color=PLAIN, lw=0.8, label="median")
        for key in ("lo", "hi"):
            ax.plot(table[key]["t"], table[key]["v"], color=LEARNED, label="range" if key == "lo" else None)
        ax.set_title(name)
    _legend(figure, axes[0])
    return figure


def _groups(data: Json) -> Figure | None:
    """The middle 98% of values over t, for each class or prompt (supp Figure 5)."""
    names = [name for name in _most_varying(data) if "by_group" in data["activations"].get(name, {})]
    if not names:
        return None
    figure, axes = _grid(len(names), 4, 2.6, 1.8)
    for ax, name in zip(axes, names, strict=True):
        seen = data["activations"][name]["by_group"]
        for g, (low, high) in enumerate(zip(seen["low"], seen["high"], strict=True)):
            for values, label in ((high, data["groups"][g]), (low, None)):
                ax.plot(data["steps"], np.array(values, float), color=f"C{g}", lw=0.9, label=label)
        ax.set_title(name)
    _legend(figure, axes[0])
    return figure


def _seeds(data: Json) -> Figure | None:
    """Intervals of several seeds (supp Figure 1)."""
    groups = seeds(data)
    names = _most_varying(data)
    if not groups or not names:
        return None
    group = [data["artifacts"][i] for i in groups[0]]
    names = [name for name in names if all("scale" in a["tables"].get(name, {}) for a in group)]
    if not names:
        return None
    figure, axes = _grid(len(names), 4, 2.6, 1.6)
    for ax, name in zip(axes, names, strict=True):
        for artifact in group:
            curve = artifact["tables"][name]["scale"]
            ax.plot(curve["t"], curve["v"], label=f"{artifact['name']} (seed {artifact['seed']})")
        ax.set_title(name)
        ax.set_ylim(bottom=0)
    _legend(figure, axes[0])
    return figure


def _steps(data: Json) -> Figure | None:
    """SQNR of the prediction over t, every artifact."""
    figure, (ax,) = _grid(1, 1, 5.0, 2.8)
    for artifact in data["artifacts"]:
        if artifact["errors"]:
            ax.plot(data["steps"], np.array(artifact["errors"]["prediction"], float), label=artifact["name"])
        elif artifact["stored"]:
            stored = artifact["stored"]["learned"]
            ax.plot(stored["t"], np.array(stored["v"], float), label=artifact["name"])
    if not ax.lines:
        return None
    ax.set(xlabel="time step t", ylabel="SQNR of the prediction (dB)")
    ax.legend()
    return figure


def _error(data: Json) -> Figure | None:
    """SQNR of every layer at every step."""
    artifact = data["artifacts"][0]
    if not artifact["errors"]:
        return None
    names = [layer["name"] for layer in artifact["layers"]]
    figure, axes = _grid(3, 3, 3.6, 0.7 + 0.11 * len(names))
    titles = {"own": "own", "inputs": "own, activations only", "accumulated": "accumulated"}
    for ax, (key, title) in zip(axes, titles.items(), strict=True):
        values = np.array(artifact["errors"][key], float)
        finite = values[np.isfinite(values)]
        low, high = np.percentile(finite, [1, 85]) if finite.size else (0, 1)
        image = ax.imshow(values, aspect="auto", cmap="magma", vmin=low, vmax=high, interpolation="nearest")
        ax.set_title(f"{title} (dB)")
        ax.set_yticks(range(len(names)), names if ax is axes[0] else [], fontsize=5)
        every = max(1, len(data["steps"]) // 5)
        ax.set_xticks(range(0, len(data["steps"]), every), [f"{t:.4g}" for t in data["steps"][::every]])
        ax.set_xlabel("time step t")
        figure.colorbar(image, ax=ax, location="bottom", extend="max", shrink=0.8)
    return figure


def _losses(data: Json) -> Figure | None:
    """Reconstruction loss of every unit before and after learning."""
    phases = data["artifacts"][0]["reconstruction"]
    if not phases:
        return None
    longest = max(len(units) for units in phases.values())
    figure, axes = _grid(len(phases), 2, 4.4, 0.6 + 0.14 * longest)
    for ax, (phase, units) in zip(axes, sorted(phases.items(), reverse=True), strict=True):
        before, after = (np.array([u[key] for u in units], float) for key in ("before", "after"))
        places = np.arange(len(units))
        ax.hlines(places, before, after, color=LEARNED, alpha=0.5)
        ax.plot(before, places, "o", ms=3.5, mfc="white", color=LEARNED, label="before")
        ax.plot(after, places, "o", ms=3.5, color=LEARNED, label="after")
        if np.nanmin(np.concatenate([before, after])) > 0:
            ax.set_xscale("log")
        ax.set_yticks(places, [u["unit"] for u in units], fontsize=5.5)
        ax.invert_yaxis()
        ax.set(title=f"phase {phase}", xlabel="loss")
        ax.legend()
    return figure


_FIGURES: dict[str, Callable[[Json], Figure | None]] = {
    "intervals": _intervals,
    "distribution": _distribution,
    "groups": _groups,
    "seeds": _seeds,
    "steps": _steps,
    "error": _error,
    "losses": _losses,
}
