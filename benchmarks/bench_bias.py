"""What a time-dependent bias correction could take: the share of each layer's output error that is a mean per channel
and time step, beside what a bias for all t takes.

Both models run on the same full-precision trajectories. At each step the mean error per output channel of the first
half of the samples ("each t"), or its mean over all steps ("all t"), is taken from the error of the other half; the
share is what that removes of its energy (negative: it adds). Layers of the time embedding, whose outputs are functions
of t and class alone, are left out. One JSON line per artifact, with the shares of each layer over all steps.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch
from facts import facts
from torch import Tensor, nn

from ptq_tdq import load_model, load_quantized
from ptq_tdq.evaluate.trajectories import make_reference

RESULTS = Path(__file__).parent / "results" / "bias.jsonl"
PREDICTION = "predicted noise"


@contextmanager
def outputs(layers: dict[str, nn.Module], found: dict[str, Tensor]) -> Iterator[None]:
    """Fill ``found`` with the output of each layer during a ``with`` block."""

    def keep(name: str) -> object:
        return lambda module, values, output: found.update({name: output})

    handles = [layer.register_forward_hook(keep(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Errors:
    """Errors of one layer, step by step."""

    def __init__(self) -> None:
        self.means: list[Tensor] = []  # of the first half of the samples, per channel
        self.sums: list[Tensor] = []  # of the second half
        self.energies: list[Tensor] = []
        self.count = 0  # values per channel in the second half of a step

    def add(self, error: Tensor) -> None:
        """``error`` [N, C, H, W] or [N, tokens, C] of the next step."""
        learn, test = (error.flatten(2) if error.ndim == 4 else error.transpose(1, 2)).double().chunk(2)
        self.means.append(learn.mean((0, 2)))
        self.sums.append(test.sum((0, 2)))
        self.energies.append(test.square().sum())
        self.count = test.shape[0] * test.shape[2]

    def shares(self) -> dict[str, float]:
        """What taking the means from the errors removes of their energy."""
        means, sums, energy = torch.stack(self.means), torch.stack(self.sums), torch.stack(self.energies).sum()
        kinds = {"each t": means, "all t": means.mean(0).expand_as(means)}
        return {kind: ((2 * m * sums - self.count * m.square()).sum() / energy).item() for kind, m in kinds.items()}


@click.command()
@click.argument("artifacts", nargs=-1, type=click.Path(path_type=Path, exists=True))
@click.option("--samples", default=64)
@click.option("--steps", default=20)
@click.option("--seed", default=0)
@click.option("--threads", default=1)
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS)
def main(artifacts: tuple[Path, ...], samples: int, steps: int, seed: int, threads: int, results: Path) -> None:
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    model = load_model()
    reference = make_reference(model, samples=samples, num_inference_steps=steps, seed=seed, recorded=samples)
    for path in artifacts:
        quantized = load_quantized(path)
        layers = quantized.layers()
        full = {name: model.unet.get_submodule(name) for name in layers}
        errors: dict[str, Errors] = defaultdict(Errors)
        for x, t in zip(reference.x, reference.t, strict=True):
            expected: dict[str, Tensor] = {}
            got: dict[str, Tensor] = {}
            with torch.no_grad(), outputs(full, expected), outputs(layers, got):
                expected[PREDICTION] = model.unet(x, t, **reference.labels()).sample
                got[PREDICTION] = quantized(x, t, **reference.labels()).sample
            for name, target in ((name, y) for name, y in expected.items() if y.ndim > 2):
                errors[name].add(got[name] - target)
        shares = {name: each.shares() for name, each in errors.items()}
        line = {
            "scheme": quantized.provenance["scheme"], "method": quantized.provenance["method"],
            "choices": quantized.provenance["choices"], "samples": samples, "steps": steps, "seed": seed,
            "shares": shares, "facts": facts(),
        }  # fmt: skip
        with results.open("a") as file:
            file.write(json.dumps(line) + "\n")
    print(table([json.loads(line) for line in results.read_text().splitlines()]))


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown: a row per artifact."""
    rows = ["| scheme | bias | median of the layers | largest | predicted noise |", "|---|---|---:|---:|---:|"]
    for line in lines:
        for kind in ("all t", "each t"):
            inner = [share[kind] for name, share in line["shares"].items() if name != PREDICTION]
            cells = (median(inner), max(inner), line["shares"][PREDICTION][kind])
            rows.append(f"| {line['scheme']} | {kind} | " + " | ".join(f"{cell:.2%}" for cell in cells) + " |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
