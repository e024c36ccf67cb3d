"""A bias that follows t: what it could take of each layer's output error, and what it gains where it is applied.

Both models run on the same full-precision trajectories. At each step the mean error per output channel of the first
half of the samples ("each t"), or its mean over all steps ("all t"), is taken from the error of the other half; the
share is what that removes of its energy (negative: it adds). Layers of the time embedding, whose outputs are functions
of t and class alone, are left out.

Then the means are taken from the outputs themselves, layer after layer, so that each layer's mean is what those before
it have left, and kept as a table per step. With it in place ("after") and without ("before") the model is compared with
full precision on trajectories of another seed. One JSON line per artifact.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch
from facts import facts
from paired import paired
from torch import Tensor, nn

from ptq_tdq import load_model, load_quantized
from ptq_tdq.calib_data import LoadedModel
from ptq_tdq.evaluate.trajectories import compare, make_reference
from ptq_tdq.quantized_model import QuantizedModel

RESULTS = Path(__file__).parent / "results" / "bias.jsonl"
PREDICTION = "predicted noise"
TESTED, OTHER_SEED = 200, 1000  # trajectories of another seed


@contextmanager
def hooked(layers: dict[str, nn.Module], change: Callable[[str, Tensor], Tensor | None]) -> Iterator[None]:
    """Give the output of each layer to ``change`` during a ``with`` block; what that returns replaces it."""

    def hook(name: str) -> Any:
        return lambda module, args, output: change(name, output)

    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def outputs(unet: nn.Module, layers: dict[str, nn.Module], x: Tensor, t: Tensor, labels: Any) -> dict[str, Tensor]:
    """The output of each layer with a spatial or token axis, and the predicted noise."""
    found: dict[str, Tensor] = {}
    with torch.no_grad(), hooked(layers, lambda name, output: found.update({name: output})):
        prediction = unet(x, t, **labels).sample
    return {name: y for name, y in found.items() if y.ndim > 2} | {PREDICTION: prediction}


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


class StepBias:
    """The mean error per output channel of each layer at each step, to be taken from its output."""

    def __init__(self, quantized: QuantizedModel) -> None:
        self.quantized, self.layers = quantized, dict[str, nn.Module](quantized.layers())
        self.tables: dict[float, dict[str, Tensor]] = {}  # by t and layer

    def learn(self, expected: dict[str, Tensor], x: Tensor, t: Tensor, labels: Any) -> None:
        """Fill the table of a step, whose full-precision outputs are ``expected``."""
        table = self.tables[t[0].item()] = {}

        def correct(name: str, output: Tensor) -> Tensor:
            if name not in expected:
                return output
            table[name] = (output - expected[name]).mean((0, 2, 3) if output.ndim == 4 else (0, 1))
            return self._without(output, table[name])

        with torch.no_grad(), hooked(self.layers, correct):
            self.quantized(x, t, **labels)

    @contextmanager
    def applied(self) -> Iterator[nn.Module]:
        """The quantized model with the biases of its time step."""
        now: dict[str, Tensor] = {}

        def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal now
            t = args[1] if len(args) > 1 else kwargs["timestep"]
            now = self.tables[float(torch.as_tensor(t).flatten()[0])]

        handle = self.quantized.register_forward_pre_hook(begin, with_kwargs=True)
        try:
            with hooked(self.layers, lambda name, y: self._without(y, now[name]) if name in now else y):
                yield self.quantized
        finally:
            handle.remove()

    @staticmethod
    def _without(output: Tensor, mean: Tensor) -> Tensor:
        return output - (mean[:, None, None] if output.ndim == 4 else mean)


def measure(path: Path, model: LoadedModel, samples: int, steps: int) -> dict[str, Any]:
    """The line of one artifact, whose own seed is that of the noise."""
    quantized = load_quantized(path)
    seed = quantized.provenance["seed"]
    reference = make_reference(model, samples=samples, num_inference_steps=steps, seed=seed)
    layers = dict[str, nn.Module](quantized.layers())
    full = {name: model.unet.get_submodule(name) for name in layers}
    errors: dict[str, Errors] = defaultdict(Errors)
    bias = StepBias(quantized)
    for x, t in zip(reference.x, reference.t, strict=True):
        expected = outputs(model.unet, full, x, t, reference.labels())
        got = outputs(quantized, layers, x, t, reference.labels())
        for name, target in expected.items():
            errors[name].add(got[name] - target)
        bias.learn(expected, x, t, reference.labels())
    test = make_reference(model, samples=TESTED, num_inference_steps=steps, seed=seed + OTHER_SEED)
    before = compare(test, quantized, seed + OTHER_SEED)
    with bias.applied() as corrected:
        after = compare(test, corrected, seed + OTHER_SEED)
    return {
        "scheme": quantized.provenance["scheme"], "method": quantized.provenance["method"],
        "choices": quantized.provenance["choices"], "samples": samples, "steps": steps, "seed": seed,
        "shares": {name: each.shares() for name, each in errors.items()},
        "before": before.to_dict(), "after": after.to_dict(), "facts": facts(),
    }  # fmt: skip


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown: a row per artifact and kind of bias."""
    rows = [
        "| scheme | seed | bias | median of the layers | largest | predicted noise |",
        "|---|---:|---|---:|---:|---:|",
    ]
    for line in lines:
        for kind in ("all t", "each t"):
            inner = [share[kind] for name, share in line["shares"].items() if name != PREDICTION]
            cells = (median(inner), max(inner), line["shares"][PREDICTION][kind])
            shares = " | ".join(f"{cell:.2%}" for cell in cells)
            rows.append(f"| {line['scheme']} | {line['seed']} | {kind} | {shares} |")
    return "\n".join(rows)


@click.command()
@click.argument("artifacts", nargs=-1, type=click.Path(path_type=Path, exists=True))
@click.option("--samples", default=64)
@click.option("--steps", default=20)
@click.option("--threads", default=1)
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS)
@click.option("--render", is_flag=True, help="Only print the table.")
def main(artifacts: tuple[Path, ...], samples: int, steps: int, threads: int, results: Path, render: bool) -> None:
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    if not render:
        model = load_model()
        for path in artifacts:
            line = measure(path, model, samples, steps)
            with results.open("a") as file:
                file.write(json.dumps(line) + "\n")
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    print(table(lines), "", paired([line for line in lines if "before" in line], ("scheme",)), sep="\n")


if __name__ == "__main__":
    main()
