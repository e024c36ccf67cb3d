"""Where one call of the integer model goes: each pass of ``native.c``, beside what products take at best.

One JSON line per (model, scheme, batch), one thread, milliseconds of CPU time, the least of several rounds in a row, as
a sampler calls. "products" are all multiply-accumulates of a layer's codes at ``peak_gmacs``, which this processor
reaches with 1,024 rows of 2,048 channels and 256 outputs; "layers, beyond" is what layers take more than that: norms of
images, activations, rotations, quantizing, short sums; "other" is a call less all passes: Python, torch's own
operations, and caches that are cold when a pass begins.
"""

from __future__ import annotations

import ctypes
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import click
import torch
from bench_runtime import Subject
from lines import append, read
from subjects import at, call_of

from ptq_tdq import load_quantized
from ptq_tdq.runtime.native import open_library
from ptq_tdq.runtime.passes import ATTEND, LAYER, NORMALIZE, WEIGH
from ptq_tdq.runtime.products import Convolution, Geometry, NativeProducts, Weights
from ptq_tdq.runtime.step import Interval

RESULTS = Path(__file__).parent / "results" / "passes.jsonl"
PRODUCTS, BEYOND, OTHER = "products", "layers, beyond", "other"
PARTS = {LAYER: BEYOND, ATTEND: "attention", NORMALIZE: "norms of tokens", WEIGH: "weights alone"}


@click.command()
@click.option("--models", default="embedded,random,reference-dit")
@click.option("--schemes", default="W8A8,W4A8")
@click.option("--batches", default="1,8")
@click.option("--rounds", default=60)
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS)
@click.option("--render", is_flag=True, help="Only print the table.")
def main(models: str, schemes: str, batches: str, rounds: int, results: Path, render: bool) -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for name in [] if render else models.split(","):
            subject = Subject(name, Path(folder) / name)
            for scheme in schemes.split(","):
                for batch in map(int, batches.split(",")):
                    append(results, {"model": name, "scheme": scheme, **measure(subject, scheme, batch, rounds)})
    print(table(read(results)))


def measure(subject: Subject, scheme: str, batch: int, rounds: int) -> dict[str, Any]:
    calls, library = subject.calls, open_library()
    assert isinstance(library, ctypes.CDLL), library
    inputs, steps = call_of(calls, batch, 500), cycle(at(calls, batch, 20 * i) for i in range(50))

    def call() -> None:
        model(**inputs | {calls.axis.argument: next(steps)})

    model = load_quantized(subject.folder / scheme, backend="integer")
    call()
    whole, peak, passes = seconds(call, rounds), peak_rate(library), Passes(library)
    vars(library).update(go=passes.plan, layer=passes.layer)
    try:
        model = load_quantized(subject.folder / scheme, backend="integer")
        call()
    finally:
        del library.go, library.layer
    spent = passes.spent
    spent[PRODUCTS] = passes.products / peak
    spent[BEYOND] -= spent[PRODUCTS]
    spent[OTHER] = whole - sum(spent.values())
    return {
        "batch": batch,
        "milliseconds": 1000 * whole,
        "multiply_accumulates": passes.products,
        "peak_gmacs": peak / 1e9,
        "parts": {name: 1000 * spent[name] for name in (PRODUCTS, *PARTS.values(), OTHER)},
    }


class Passes:
    """In the place of the library's functions: seconds by part, and the products of codes in layers."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.spent, self.products = dict.fromkeys(PARTS.values(), 0.0), 0
        go, layer = library.go, library.layer

        def plan(passes: Any, count: int, scratch: int, given: Any) -> int:
            before = 0.0
            for number in range(count):  # what all up to this one take more than those before it
                until = seconds(partial(go, passes, number + 1, scratch, given))
                self.spent[PARTS[passes[number].kind]] += until - before
                before = until
                if passes[number].kind == LAYER:
                    self._count(passes[number].convolution)
            return 0

        def alone(*told: Any) -> int:
            self.spent[BEYOND] += seconds(partial(layer, *told))
            self._count(told[2])
            return 0

        self.plan, self.layer = plan, alone

    def _count(self, address: int) -> None:
        c = Convolution.from_address(address)
        pixels, taps = c.batch * c.out_height * c.out_width, c.kernel_height * c.kernel_width
        self.products += pixels * c.outputs * c.channels * taps


def peak_rate(library: ctypes.CDLL) -> float:
    """Multiply-accumulates a second in one large product of codes of 8 bits."""
    outputs, channels, rows = 256, 2048, 1024
    codes = torch.randint(0, 255, (outputs, channels, 1, 1), dtype=torch.uint8)
    ones, zero_point = torch.ones(outputs), torch.full((outputs,), 128, dtype=torch.int32)
    products = NativeProducts(Weights(codes, 8, ones, zero_point, torch.zeros(outputs)), Geometry(), library)
    x = torch.randint(0, 255, (rows, channels, 1, 1), dtype=torch.uint8)
    interval = Interval(torch.ones(1), torch.zeros(1, dtype=torch.int32))
    return rows * channels * outputs / seconds(lambda: products(x, interval, None))


def seconds(run: Callable[[], Any], times: int = 9) -> float:
    """CPU time, the least of several in a row."""
    best = float("inf")
    for _ in range(times):
        began = time.process_time()
        run()
        best = min(best, time.process_time() - began)
    return best


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown: shares of a call."""
    names = list(lines[0]["parts"]) if lines else []
    rows = [f"| model | scheme | batch | call (ms) | {' | '.join(names)} |", "|---" * (4 + len(names)) + "|"]
    for line in lines:
        shares = " | ".join(f"{100 * line['parts'][name] / line['milliseconds']:.0f}%" for name in names)
        start = f"| {line['model']} | {line['scheme']} | {line['batch']} | {line['milliseconds']:.2f}"
        rows.append(f"{start} | {shares} |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
