"""What a time-dependent bias correction could take: the share of each layer's output error that is a mean per channel
and time step.

Both models run on the same full-precision trajectories. At each step the mean error per output channel of the first
half of the samples is taken from the error of the other half; the share is what that removes of its energy (negative:
it adds). Layers of the time embedding, whose outputs are functions of t and class alone, are left out. One JSON line
per artifact with the share of each layer over all steps, of the predicted noise, and by step.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

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


def energies(error: Tensor) -> tuple[float, float]:
    """``error`` [N, C, H, W] or [N, tokens, C]: the second half's energy, and what the first half's mean leaves."""
    learn, test = (error.flatten(2) if error.ndim == 4 else error.transpose(1, 2)).double().chunk(2)
    mean = learn.mean((0, 2), keepdim=True)
    return test.square().sum().item(), (test - mean).square().sum().item()


@click.command()
@click.argument("artifacts", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
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
        before: dict[str, list[float]] = defaultdict(list)
        after: dict[str, list[float]] = defaultdict(list)
        for x, t in zip(reference.x, reference.t, strict=True):
            expected: dict[str, Tensor] = {}
            got: dict[str, Tensor] = {}
            with torch.no_grad(), outputs(full, expected), outputs(layers, got):
                expected[PREDICTION] = model.unet(x, t, **reference.labels()).sample
                got[PREDICTION] = quantized(x, t, **reference.labels()).sample
            for name, target in ((name, y) for name, y in expected.items() if y.ndim > 2):
                energy, left = energies(got[name] - target)
                before[name].append(energy)
                after[name].append(left)
        shares = {name: 1 - sum(after[name]) / sum(before[name]) for name in before}
        last = [1 - left / energy for energy, left in zip(before[PREDICTION], after[PREDICTION], strict=True)]
        line = {
            "scheme": quantized.provenance["scheme"], "method": quantized.provenance["method"],
            "choices": quantized.provenance["choices"], "samples": samples, "steps": steps, "seed": seed,
            "share_of_layers": shares, "share_of_prediction_by_step": last, "facts": facts(),
        }  # fmt: skip
        with results.open("a") as file:
            file.write(json.dumps(line) + "\n")
        inner = [share for name, share in shares.items() if name != PREDICTION]
        print(
            f"{line['scheme']}: share of the error that is a mean per channel and t: median of the layers "
            f"{median(inner):.2%}, largest {max(inner):.2%}; {PREDICTION} {shares[PREDICTION]:.2%}, "
            f"at any step at most {max(last):.2%}"
        )


if __name__ == "__main__":
    main()
