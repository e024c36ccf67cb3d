"""A table of what was measured before and after something, over the seeds of a benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any

from scipy import stats

METRICS = {"latent_sqnr_db": "final latents (dB)", "mean_noise_sqnr_db": "predicted noise (dB)"}


def paired(lines: Sequence[dict[str, Any]], keys: Sequence[str]) -> str:
    """Markdown: a row per value of ``keys``; mean over its lines (one per seed) of "before" and of "after", and p of a
    paired t-test.
    """
    rows = [
        f"| {' | '.join(keys)} | seeds | "
        + " | ".join(f"{name}, before | after | p" for name in METRICS.values())
        + " |",
        "|" + "---|" * (len(keys) + 1) + "---:|" * 3 * len(METRICS),
    ]
    for place in dict.fromkeys(tuple(line[key] for key in keys) for line in lines):
        same = [line for line in lines if tuple(line[key] for key in keys) == place]
        cells = [*map(str, place), str(len(same))]
        for metric in METRICS:
            before, after = ([line[when][metric] for line in same] for when in ("before", "after"))
            cells += [f"{mean(v):.2f} ± {stdev(v):.2f}" if len(v) > 1 else f"{v[0]:.2f}" for v in (before, after)]
            cells.append(f"{stats.ttest_rel(after, before).pvalue:.2g}" if len(same) > 1 else "-")
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)
