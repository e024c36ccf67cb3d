"""Scales for groups of input channels: what they add to a weight's precision, and what they cost.

Each Linear layer of an embedded transformer that sees tokens is rounded alone, as phase W does (first intervals by
search, then GPTQ), by the second moments of its own full-precision inputs on calibration trajectories, with one scale
for each output channel or for each group of ``--groups`` input channels. ``sqnr_db`` is that of its output on
trajectories of another seed. Bits count 16 for a scale and those of a code for a zero point, as group formats store
them. One JSON line per layer; ``--render`` prints means over layers, plain and behind a rotation.
"""

from __future__ import annotations

from pathlib import Path
from statistics import mean, stdev
from typing import Any

import click
import torch
from lines import append, read
from torch import Tensor, nn

from ptq_tdq import load_model
from ptq_tdq.calib_data import LoadedModel, collect_cached
from ptq_tdq.config import preset
from ptq_tdq.gptq import gptq, layer_error, solve_order
from ptq_tdq.hooks import hooked
from ptq_tdq.rotate import rotated
from ptq_tdq.scheme import QType
from ptq_tdq.search import row_qparams

RESULTS = Path(__file__).parent / "results" / "groups.jsonl"
FRESH_SEED = 12345
Line = dict[str, Any]


def moments(model: LoadedModel, seed: int, trajectories: int) -> dict[str, Tensor]:
    """``E[x x^T]`` [K, K] (float64) of the inputs of all Linear layers that see tokens [..., n, K]."""
    recipe = preset("default", samples_per_step=trajectories // 8, seed=seed).recipe
    calls, found, count = collect_cached(model, **recipe), dict[str, Tensor](), dict[str, int]()

    def listen(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if args[0].ndim > 2:
                x = args[0].flatten(0, -2).double()
                found[name], count[name] = found.get(name, 0) + x.t() @ x, count.get(name, 0) + len(x)

        return hook

    layers = ((name, m) for name, m in model.denoiser.named_modules() if isinstance(m, nn.Linear))
    with torch.no_grad(), hooked(module.register_forward_pre_hook(listen(name)) for name, module in layers):
        for start in range(0, len(calls), 64):
            model.denoiser(**calls.inputs(slice(start, min(start + 64, len(calls)))))
    return {name: total / count[name] for name, total in found.items()}


def rounded(weight: Tensor, hessian: Tensor, bits: int, group: int) -> Tensor:
    """``weight`` [O, K] as its codes stand for it, with a scale for each ``group`` input channels of a row."""
    qtype = QType(bits)
    first = row_qparams(weight.reshape(-1, group), qtype)
    scale, zero = (x.view(len(weight), -1).repeat_interleave(group, 1) for x in (first.scale, first.zero_point))
    codes, _ = gptq(weight, solve_order(hessian), scale[None], zero, qtype)
    return (codes[0] - zero) * scale


@click.command()
@click.option("--model", "name", default="reference-dit")
@click.option("--bits", default="4,3")
@click.option("--groups", default="128,64,32", help="Input channels that share a scale; all of them besides.")
@click.option("--trajectories", default=64, help="That layers are rounded by, and as many fresh ones; by 8.")
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS)
@click.option("--threads", default=1)
@click.option("--render", is_flag=True, help="Only print the table.")
def main(name: str, bits: str, groups: str, trajectories: int, results: Path, threads: int, render: bool) -> None:
    if not render:
        torch.set_num_threads(threads)
        model = load_model(name)
        seen, fresh = (moments(model, seed, trajectories) for seed in (0, FRESH_SEED))
        sizes = [int(group) for group in groups.split(",")]
        results.unlink(missing_ok=True)
        for layer in seen:
            weight = model.denoiser.get_submodule(layer).weight.detach()
            found = [
                one
                for width in map(int, bits.split(","))
                for one in measure(weight, seen[layer], fresh[layer], width, sizes)
            ]
            append(results, {"model": name, "layer": layer, "trajectories": trajectories, "found": found})
    print(table([{"layer": line["layer"], **one} for line in read(results) for one in line["found"]]))


def measure(weight: Tensor, seen: Tensor, fresh: Tensor, bits: int, groups: list[int]) -> list[Line]:
    """Of one layer, plain and rotated, with each group size that divides its input channels."""
    lines, channels = [], weight.shape[1]
    for rotate in (False, True):
        own, by, judge = weight, seen, fresh
        if rotate:
            own, by, judge = rotated(own), rotated(rotated(by).t()), rotated(rotated(judge).t())
        power = layer_error(own, judge).sum()
        for group in (channels, *(g for g in groups if g < channels and channels % g == 0)):
            error = layer_error(own - rounded(own, by, bits, group), judge).sum()
            size = {"group": None if group == channels else group, "mean_bits": bits + (16 + bits) / group}
            lines.append({"bits": bits, "rotated": rotate, **size, "sqnr_db": float(10 * torch.log10(power / error))})
    return lines


def table(lines: list[Line]) -> str:
    """Markdown: mean SQNR of the layers' outputs, and what groups add with what they cost, layer by layer."""
    rows = [
        "| codes | rotated | group | mean bits | output SQNR (dB) | gain (dB) | gain a bit (dB) |",
        "|---" * 7 + "|",
    ]
    kinds = dict.fromkeys((line["bits"], line["rotated"], line["group"]) for line in lines)
    whole = {(x["layer"], x["bits"], x["rotated"]): x for x in lines if x["group"] is None}
    for bits, rotate, group in kinds:
        found = [x for x in lines if (x["bits"], x["rotated"], x["group"]) == (bits, rotate, group)]
        pairs = [(x, whole[x["layer"], bits, rotate]) for x in found]
        gains = [x["sqnr_db"] - one["sqnr_db"] for x, one in pairs]
        cost = mean(x["mean_bits"] - one["mean_bits"] for x, one in pairs)
        spread = f" ± {stdev(gains):.2f}" if group and len(gains) > 1 else ""
        values = [
            f"{mean(x['mean_bits'] for x in found):.2f}",
            f"{mean(x['sqnr_db'] for x in found):.2f}",
            f"{mean(gains):+.2f}{spread}" if group else "",
            f"{mean(gains) / cost:.1f}" if group else "",
        ]
        rows.append(f"| {bits} | {'yes' if rotate else 'no'} | {group or 'all'} | {' | '.join(values)} |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
