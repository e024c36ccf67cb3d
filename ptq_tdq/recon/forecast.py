"""What a run will take, before it begins: from one call, the choices, and how fast this machine multiplies."""

from __future__ import annotations

import resource
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ptq_tdq.affine import fake_quantize
from ptq_tdq.calls import Calls
from ptq_tdq.config import Config
from ptq_tdq.errors import OutputError
from ptq_tdq.modules import QuantLayer
from ptq_tdq.modules.layers import weight_groups
from ptq_tdq.quantized_model import QuantizedModel
from ptq_tdq.recon.closed_form import FACTORS, PIECE
from ptq_tdq.recon.moments import COLUMNS, rows_of
from ptq_tdq.recon.size import UnitSize, at_once, stream_bytes, unit_sizes
from ptq_tdq.recon.weights import LEARNED_BITS
from ptq_tdq.scheme import MAX_BITS, QType

WITH_GRADIENTS = 3.0  # cost of a step of learning, in forward passes
PICKING = 7000  # cost of a number of a layer's input that is picked and scaled, in operations
DOUBLE = 3.0  # cost of an operation in float64, with what is done to single columns
ERROR = 0.3  # of a forecast, at most
DOCUMENT_BYTES = 4 << 10  # that an artifact says in text of each layer
RUNTIME_BYTES = 300 << 20  # what python and the libraries allocate as they go


@dataclass(frozen=True)
class Forecast:
    """What a run will take. Bytes, and seconds of this machine when it has nothing else to do.

    ``recorded_bytes`` are those of ``rows`` recorded calls, ``stream_bytes`` what flows between units: in memory, or
    on disk where ``streams_on_disk``. ``memory_bytes`` is the peak of what the process allocates, ``disk_bytes`` that
    of what it writes. ``recording_seconds`` are the sampler's.
    """

    units: int
    layers: int
    rows: int
    recorded_bytes: int
    stream_bytes: int
    streams_on_disk: bool
    memory_bytes: int
    disk_bytes: int
    recording_seconds: float
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def make_forecast(
    quantized: QuantizedModel, call: Calls, config: Config, *, rows: int, sampled: int, budget: int
) -> Forecast:
    """The forecast for ``rows`` calls like ``call``, which take the sampler ``sampled`` of them to record."""
    sizes = unit_sizes(quantized, call.inputs(slice(0, 1)))
    streams = stream_bytes(sizes, rows)
    products, quantizing = _products_per_second(), _seconds_per_byte()
    each = _seconds_per_row(quantized, call, rows)
    operations = max(1, sum(size.operations for size in sizes.values()))
    layers, memory, seconds = quantized.layers(), 0, 0.0
    of_unit: dict[str, list[QuantLayer]] = {name: [] for name in quantized.units()}
    for layer in layers.values():
        of_unit[layer.record.unit].append(layer)
    for name, own in of_unit.items():
        size = sizes.get(name, UnitSize())
        memory = max(memory, _unit_bytes(size, own, config, rows, streams > budget))
        plain, behind = _passes(own, config, rows)
        seconds += rows * (each * size.operations / operations * (plain + behind) + quantizing * size.made * behind)
        seconds += _closed_form_seconds(own, size, config, rows, products)
    weights = sum(layer.weight.numel() for layer in layers.values())
    kept = sum(p.nbytes for p in quantized.parameters())
    bits = [layer.record.weight_bits or MAX_BITS for layer in layers.values()]
    packed = sum(layer.weight.numel() * b // 8 for layer, b in zip(layers.values(), bits, strict=True))
    floating = kept - 4 * weights
    recorded = rows * _bytes(call) // len(call)
    finished = 4 * weights + floating + 2 * (packed + floating)  # the new weights, and the file as it is written
    memory = own_bytes() + weights + max(memory, finished) + RUNTIME_BYTES + recorded
    # two files of each unit, with a byte for a weight; then the artifact beside them
    tables = 8 * call.axis.length * len(quantized.quantizers()) + DOCUMENT_BYTES * len(quantized.plan)
    disk = 2 * recorded + 2 * (weights + tables) + max(streams if streams > budget else 0, packed + floating + tables)
    return Forecast(
        len(of_unit), len(layers), rows, recorded, streams, streams > budget, memory, disk, each * sampled, seconds
    )


def check_room(found: Forecast, folder: Path) -> None:
    """Raise :class:`OutputError` for a run that this machine's memory, or the disk of ``folder``, will not hold.

    Memory counts with the least that the forecast may mean.
    """
    free = free_memory()
    if free is not None and (1 - ERROR) * found.memory_bytes > free + own_bytes():
        raise OutputError(
            f"The run needs about {size_text(found.memory_bytes)} of memory, of which {size_text(free + own_bytes())} "
            "are there; lower --cache-budget or --samples-per-step."
        )
    place = next(parent for parent in (folder, *folder.resolve().parents) if parent.is_dir())
    free = shutil.disk_usage(place).free
    if found.disk_bytes > free:
        raise OutputError(
            f"The run needs about {size_text(found.disk_bytes)} of disk, of which {size_text(free)} are free in "
            f"{place}; free some space or choose another output directory."
        )


def size_text(count: float) -> str:
    """A number of bytes as people read it: "1.5 GiB"."""
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:,.1f} GiB"


def free_memory() -> int | None:
    """Bytes that may still be allocated, within the limit of the control group too; None where nothing tells."""
    found = [int(line.split()[1]) * 1024 for line in _lines("/proc/meminfo") if line.startswith("MemAvailable")]
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        most, now = (_lines(f"/sys/fs/cgroup/{name}") for name in (limit, used))
        if most and now and most[0].isdecimal():
            found.append(int(most[0]) - int(now[0]))
    return min(found, default=None)


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def _bytes(calls: Calls) -> int:
    leaves = [leaf for group in calls.groups for leaf in group.rows]
    return sum(x.nbytes for leaf in leaves for x in ([leaf] if isinstance(leaf, Tensor) else leaf.items))


def _unit_bytes(size: UnitSize, layers: Sequence[QuantLayer], config: Config, rows: int, on_disk: bool) -> int:
    """What is allocated while one unit is learned, beside the model."""
    streams = size.own if on_disk else size.given + size.own + size.inputs + size.outputs
    some = min(rows, at_once(size))
    work = [some * size.most, min(some, config.learning.batch_size) * size.made]
    if config.weights.rounding in ("gptq", "learned"):
        work += [2 * some * size.most + _closed_form_bytes(layer, size, rows) for layer in layers]
    weights = sum(layer.weight.numel() for layer in layers)
    return 2 * rows * streams + max(work) + 8 * weights


def _closed_form_bytes(layer: QuantLayer, size: UnitSize, samples: int) -> int:
    groups, outputs, columns, rows = _shape(layer, size, samples)
    block = min(COLUMNS, columns)
    rounded = min(PIECE, len(FACTORS) * outputs * block)
    kept = 4 * groups * rows * (columns + outputs)
    return kept + 8 * (4 * block**2 + 4 * outputs * block + 4 * rounded)


def _shape(layer: QuantLayer, size: UnitSize, samples: int) -> tuple[int, int, int, int]:
    """Groups; outputs, columns and rows of the inputs of each."""
    groups, columns = weight_groups(layer.layer), layer.weight[0].numel()
    outputs = len(layer.weight) // groups
    there = samples * size.places.get(layer.record.name, 1)
    return groups, outputs, columns, min(rows_of(groups, columns, outputs), there)


def _closed_form_seconds(
    layers: Sequence[QuantLayer], size: UnitSize, config: Config, samples: int, per_second: float
) -> float:
    """Both times, or once: products of rows, two factorizations of each block, one pass over the rows' columns."""
    if config.weights.rounding not in ("gptq", "learned"):
        return 0.0
    operations = 0.0
    for layer in layers:
        groups, outputs, columns, rows = _shape(layer, size, samples)
        block = min(COLUMNS, columns)
        products = rows * columns * (1.5 * block + 6 * outputs + PICKING)
        solved = columns * block * (2 * block + (len(FACTORS) + 6) * outputs)
        operations += groups * (products + DOUBLE * solved)
    return (1 + config.weights.round_again) * operations / per_second


def _passes(layers: Sequence[QuantLayer], config: Config, rows: int) -> tuple[float, float]:
    """Forward passes of a unit over all rows without quantized activations, in phase W, and with, in phase A."""
    learned = WITH_GRADIENTS * config.learning.batch_size / rows
    inputs = 0.2 + 0.8 * max(0, len(layers) - 1)  # of both streams, each up to the layer; q, k and v come together
    closed, first = config.weights.rounding in ("gptq", "learned"), 4.0
    if closed:
        first += inputs
    elif config.weights.rounding == "adaround":
        first += learned * config.weights.weight_iterations
    if config.weights.equalize == "channels" or config.weights.rotate == "auto":
        first += 1
    learns = 2.0 if config.method == "auto" else 1.0
    second = 7.0 + learns * learned * config.activations.activation_iterations
    bits = min((layer.record.weight_bits or MAX_BITS for layer in layers), default=MAX_BITS)
    if config.weights.rounding == "learned" and bits <= LEARNED_BITS:
        second += learned * config.weights.weight_iterations
    return first, second + inputs + 1 if closed and config.weights.round_again else second


def _seconds_per_row(quantized: QuantizedModel, call: Calls, rows: int) -> float:
    """Of a forward pass with as many rows at once as a second allows."""

    def run(count: int) -> None:
        with torch.no_grad():
            quantized(**call.inputs(torch.zeros(count, dtype=torch.int64)))

    count, taken = 0, _seconds(partial(run, 1), 1)
    while (following := max(1, min(rows, 16, int(1 / taken)))) > count:
        count = following
        taken = _seconds(partial(run, count), 2) / count
    return taken


def _products_per_second(size: int = 1024) -> float:
    """Floating-point operations per second in a product of float32 matrices."""
    a = torch.randn(size, size)
    return 2 * size**3 / _seconds(lambda: a @ a)


def _seconds_per_byte(size: int = 1 << 22) -> float:
    """Of what quantizers make: twice a tensor, and what comes out."""
    x, one = torch.randn(size), torch.ones(())
    return _seconds(lambda: fake_quantize(x, one, one, QType(8))) / (3 * x.nbytes)


def _seconds(run: Callable[[], object], times: int = 3) -> float:
    """Of this process alone, whatever else the machine does; the fastest time."""
    found = []
    for _ in range(times):
        began = time.process_time()
        run()
        found.append(time.process_time() - began)
    return max(min(found), 1e-9) / torch.get_num_threads()


def own_bytes() -> int:
    """What this process has allocated; where the system does not say, the most that it was."""
    found = [int(line.split()[1]) * 1024 for line in _lines("/proc/self/status") if line.startswith("RssAnon")]
    return found[0] if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
