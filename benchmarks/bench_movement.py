"""How much the activations of each embedded model move with t and with the class, and what following them keeps.

Nothing is learned: the inputs of all quantizers are counted in full precision at every step of some trajectories, and
the best interval of each step is compared with the best one for all steps, both by the search of preset ``default``.
``movement`` is the widest over the narrowest range of a step, from the 0.1th to the 99.9th percentile; ``gain_db`` is
what following t adds to the activation's own SQNR, a mean over the steps, at each number of bits. ``classes`` has the
same of an interval for each class in place of each step, and ``chance`` of one for each group of as many samples drawn
without regard to their class. One JSON line per model; ``--render`` prints the table and draws the figure.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click
import matplotlib
import torch
from lines import Line, append, read
from matplotlib.figure import Figure
from torch import Tensor

from ptq_tdq import load_model, preset
from ptq_tdq.affine import fake_quantize
from ptq_tdq.evaluate.trajectories import make_reference
from ptq_tdq.plan import make_plan
from ptq_tdq.report.figures import LEARNED, PLAIN, STYLE
from ptq_tdq.report.measure import observe_activations
from ptq_tdq.scheme import QType
from ptq_tdq.search import Histogram, activation_qparams
from ptq_tdq.wrap import folded_copy

RESULTS = Path(__file__).parent / "results" / "movement.jsonl"
MODELS = "reference-pixel,reference,reference-dit"
BITS = (8, 6, 4)
DRAWN = 6  # bits of the figure
TAIL = 0.001


def movement(histogram: Histogram) -> float:
    """The widest over the narrowest range of a step, each without its outermost thousandths."""
    shares = histogram.counts.cumsum(1) / histogram.counts.sum(1, keepdim=True)
    ends = [torch.searchsorted(shares, torch.full((len(shares), 1), share))[:, 0] for share in (TAIL, 1 - TAIL)]
    low, high = (histogram.centres[end.clamp(max=len(histogram.centres) - 1)] for end in ends)
    width = (high - low).clamp(min=float(histogram.centres[1] - histogram.centres[0]))
    return float(width.max() / width.min())


def gain_db(histogram: Histogram, bits: int, *, from_zero: bool) -> float:
    """What the best interval of each step adds to the SQNR that the best one for all steps leaves, in dB."""
    qtype = QType(bits)
    pooled = histogram.pooled(torch.zeros(len(histogram.lo), dtype=torch.int64), 1)
    errors: list[Tensor] = []
    for seen in (pooled, histogram):
        found = activation_qparams(seen, qtype, method="mse-ends", from_zero=from_zero)
        rounded = fake_quantize(histogram.centres, found.scale[:, None], found.zero_point[:, None], qtype)
        errors.append(((histogram.centres - rounded).square() * histogram.counts).sum(1))
    return float(10 * (errors[0] / errors[1]).log10().nan_to_num(0, 0, 0).mean())


def moved(histogram: Histogram, from_zero: bool) -> Line:
    """How far the rows of a histogram lie apart, and what an interval for each is worth, by bits."""
    gains = {str(bits): gain_db(histogram, bits, from_zero=from_zero) for bits in BITS}
    return {"movement": movement(histogram), "gain_db": gains}


def over_steps(groups: Histogram, steps: int) -> Histogram:
    """One row for each group, of rows for each group and step."""
    rows = len(groups.counts)
    return groups.pooled(torch.arange(rows) // steps, rows // steps)


def measure(source: str, samples: int, steps: int, seed: int) -> Line:
    """One line: every activation of the model that preset ``default`` quantizes."""
    model = load_model(source)
    reference = make_reference(model, samples=samples, num_inference_steps=steps, seed=seed)
    layers = make_plan(folded_copy(model.denoiser), preset("default"), reference.calls).layers
    from_zero = {quantizer.name: quantizer.from_zero for layer in layers for quantizer in layer.inputs}
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(seed)).tolist()
    drawn = replace(reference, conditions=[reference.conditions[i] for i in order])
    chance = observe_activations(layers, drawn)
    found = []
    for name, activation in observe_activations(layers, reference).items():
        entry = {"name": name, **moved(activation.by_step, from_zero[name])}
        for key, groups in (("classes", activation.by_group), ("chance", chance[name].by_group)):
            if groups is not None:
                entry[key] = moved(over_steps(groups, steps), from_zero[name])
        found.append(entry)
    about = {"model": source, "sha256": model.sha256, "samples": samples, "steps": steps, "seed": seed}
    return {**about, "activations": found}


@click.command()
@click.option("--models", default=MODELS)
@click.option("--samples", default=40)
@click.option("--steps", default=20)
@click.option("--seed", default=0)
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS)
@click.option("--render", is_flag=True, help="Only print the table and draw the figure.")
def main(models: str, samples: int, steps: int, seed: int, results: Path, render: bool) -> None:
    if not render:
        torch.set_num_threads(1)
        for source in models.split(","):
            append(results, measure(source, samples, steps, seed))
    lines = read(results)
    print(table(lines))
    with matplotlib.rc_context(STYLE):
        draw(lines).savefig(results.with_suffix(".svg"), metadata={"Date": None})


EACH = {"step": "", "class": "classes", "group drawn at random": "chance"}  # whose interval -> where it is in a line


def table(lines: list[Line]) -> str:
    """Markdown: how far the ranges move, medians and 90th percentiles of the gains, and where the largest is."""
    heads = " | ".join(f"gain at {bits} bits, dB" for bits in BITS)
    rows = [
        f"| model | an interval for each | activations | movement | move more than 2 times | {heads} | largest gain |",
        "|---|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for line in lines:
        model = f"`{line['model']}`"
        for each, key in EACH.items():
            found = [a[key] if key else a for a in line["activations"] if not key or key in a]
            if found:
                names = [a["name"] for a in line["activations"]]
                rows.append(f"| {model} | {each} | {len(found)} | {' | '.join(_cells(found, names))} |")
                model = ""
    return "\n".join(rows)


def _cells(found: list[Line], names: list[str]) -> list[str]:
    moved = torch.tensor([a["movement"] for a in found])
    gains = torch.tensor([[a["gain_db"][str(bits)] for bits in BITS] for a in found])
    top = int(gains[:, 0].argmax())
    return [
        f"{_middle(moved)[0]:.2f} ({_middle(moved)[1]:.2f})",
        f"{float((moved > 2).float().mean()):.0%}",
        *(f"{middle:+.2f} ({high:+.2f})" for middle, high in map(_middle, gains.unbind(1))),
        f"`{names[top]}`, {' / '.join(f'{gain:+.1f}' for gain in gains[top])}",
    ]


def _middle(values: Tensor) -> tuple[float, float]:
    return float(values.quantile(0.5)), float(values.quantile(0.9))


def draw(lines: list[Line]) -> Figure:
    """A panel for each model, a dot for each activation."""
    figure = Figure(figsize=(2.1 * len(lines) + 0.4, 2.2), layout="constrained")
    for ax, line in zip(figure.subplots(1, len(lines), sharex=True, sharey=True, squeeze=False)[0], lines, strict=True):
        found = line["activations"]
        ax.scatter([a["movement"] for a in found], [a["gain_db"][str(DRAWN)] for a in found], s=6, c=LEARNED, lw=0)
        ax.axhline(0, color=PLAIN, lw=0.5)
        ax.set(xscale="log", title=line["model"], xlabel="widest / narrowest range over t")
        ax.set_xticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"], minor=False)
        ax.set_xticks([], minor=True)
    figure.axes[0].set_ylabel(f"gain of following t at A{DRAWN}, dB")
    return figure


if __name__ == "__main__":
    main()
