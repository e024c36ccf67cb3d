"""What a run will take, before it begins: from one call, the choices, and how fast this machine computes."""

from __future__ import annotations

import resource
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ptq_tdq.atomic import check_space
from ptq_tdq.calls import Calls
from ptq_tdq.config import Config
from ptq_tdq.errors import OutputError
from ptq_tdq.files import size_text
from ptq_tdq.intervals import source_class
from ptq_tdq.modules import QuantLayer
from ptq_tdq.modules.layers import weight_groups
from ptq_tdq.quantized_model import QuantizedModel
from ptq_tdq.recon.activations import STATIC, learning_iterations
from ptq_tdq.recon.closed_form import FACTORS, PIECE
from ptq_tdq.recon.engine import JUDGES
from ptq_tdq.recon.moments import COLUMNS, rows_of
from ptq_tdq.recon.pace import Pace, Rates, unit_paces
from ptq_tdq.recon.size import UnitSize, at_once, stream_bytes, unit_sizes
from ptq_tdq.recon.weights import CHECKS, LEARNED_BITS
from ptq_tdq.scheme import MAX_BITS

TRIANGULAR = 1.5  # what an operation of a factorization or a solution takes of one of a product
ERROR = 0.3  # of a forecast, at most
DOCUMENT_BYTES = 4 << 10  # that an artifact says in text of each layer
RUNTIME_BYTES = 300 << 20  # what python and the libraries allocate as they go


@dataclass(frozen=True)
class Forecast:
    """What a run will take. Bytes, and seconds of this machine when it has nothing else to do.

    ``processes`` share the work. ``recorded_bytes`` are those of ``rows`` recorded calls, ``stream_bytes`` what flows
    between units: in memory, or on disk where ``streams_on_disk``. ``memory_bytes`` is the peak of what the processes
    of this machine allocate, ``disk_bytes`` that of what they write. ``recording_seconds`` are the sampler's,
    ``measuring_seconds`` those of a comparison with full precision at the end: one process does either.
    """

    processes: int
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
    measuring_seconds: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def make_forecast(
    quantized: QuantizedModel, call: Calls, config: Config, *, rows: int, sampled: int, budget: int, measured: int = 0,
    processes: int = 1, here: int = 1,
) -> Forecast:  # fmt: skip
    """The forecast for ``rows`` calls like ``call``, which take the sampler ``sampled`` of them to record.

    At the end the model is compared with full precision in ``measured`` calls, and so it is with static intervals.
    Calls and work are shared by so many ``processes``, ``here`` of them on this machine.
    """
    call = call.to(quantized.device)
    sizes = unit_sizes(quantized, call.inputs(slice(0, 1)))
    paces = unit_paces(quantized, call, sizes, config)
    own_rows, rates = -(-rows // processes), Rates.measured(config)
    streams = here * stream_bytes(sizes, own_rows)
    on_disk = streams > here * budget
    layers, memory, seconds = quantized.layers(), 0, 0.0
    of_unit: dict[str, list[QuantLayer]] = {name: [] for name in quantized.units()}
    for layer in layers.values():
        of_unit[layer.record.unit].append(layer)
    for name, own in of_unit.items():
        size = sizes.get(name, UnitSize())
        memory = max(memory, _unit_bytes(size, own, config, own_rows, on_disk, budget))
        waiting = min(1.0, size.waiting(budget) / own_rows)
        seconds += sum(unit_seconds(own, size, paces.get(name, Pace()), rates, config, rows, processes, waiting))
    plain, behind = (sum(getattr(pace, of) for pace in paces.values()) for of in ("plain", "quantized"))
    recording, measuring = sampled * plain, measured * (plain + 4 * behind)  # own and full precision's trajectories
    weights = sum(layer.weight.numel() for layer in layers.values())
    kept = sum(p.nbytes for p in quantized.parameters())
    bits = [layer.record.weight_bits or MAX_BITS for layer in layers.values()]
    packed = sum(layer.weight.numel() * b // 8 for layer, b in zip(layers.values(), bits, strict=True))
    floating = kept - 4 * weights
    recorded = rows * _bytes(call) // len(call)
    finished = 4 * weights + floating + 2 * (packed + floating)  # the new weights, and the file as it is written
    memory = here * (own_bytes() + weights + max(memory, finished) + RUNTIME_BYTES + recorded)
    # two files of each unit, with a byte for a weight; then the artifact beside them
    tables = 8 * call.axis.length * len(quantized.quantizers()) + DOCUMENT_BYTES * len(quantized.plan)
    disk = 2 * recorded + 2 * (weights + tables) + max(streams if on_disk else 0, packed + floating + tables)
    times = recording, seconds, measuring
    return Forecast(processes, len(of_unit), len(layers), rows, recorded, streams, on_disk, memory, disk, *times)


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
    check_space(found.disk_bytes, folder)


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


def _unit_bytes(
    size: UnitSize, layers: Sequence[QuantLayer], config: Config, rows: int, on_disk: bool, budget: int
) -> int:
    """What is allocated while one unit is learned, beside the model."""
    streams = size.own if on_disk else size.given + size.own + size.inputs + size.outputs
    some = min(rows, at_once(size))
    work = [some * size.most, min(some, config.learning.batch_size) * size.made]
    if config.weights.rounding in ("gptq", "learned"):
        held = 2 * size.held * min(rows, size.waiting(budget))
        work += [held + 2 * some * size.most + _closed_form_bytes(layer, size, rows) for layer in layers]
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


def unit_seconds(
    layers: Sequence[QuantLayer], size: UnitSize, pace: Pace, rates: Rates, config: Config, rows: int, processes: int,
    waiting: float,
) -> tuple[float, float]:  # fmt: skip
    """What one unit takes with ``rows`` samples in phase W and in phase A, shared by so many processes.

    Of these samples, the share ``waiting`` waits at its layers while they are rounded.
    """
    closed = config.weights.rounding in ("gptq", "learned")
    again = closed and config.weights.round_again
    judged = (1 + _following(config)) * (1 + (config.activations.activation_iterations > 0))
    # closed-form rounding: the full-precision inputs of the layers; those in the other stream, and its outputs
    reach = waiting + (1 - waiting) * pace.reach, waiting + (1 - waiting) * (pace.reach + 1)
    first = pace.plain * (1 if config.weights.rounding == "nearest" else 2)
    second = pace.plain + (2 + judged) * pace.quantized
    if config.weights.equalize == "channels" or config.weights.rotate == "auto":
        first += pace.plain
    first += sum(reach) * pace.plain if closed else pace.plain
    second += reach[0] * pace.plain + reach[1] * pace.quantized if again else pace.quantized
    if config.method == "auto":  # each quantizer is judged alone, and by token
        tokens = config.activations.token_intervals == "auto"
        second += pace.quantized / JUDGES * (3 + pace.quantizers + tokens * (2 + pace.quantizers))
    if config.weights.rounding == "learned":
        second += pace.quantized / JUDGES * CHECKS
    starts = pace.quantizers * rates.start * (1.5 if config.method == "auto" else 1.0)  # as many as will follow t again
    steps, rounding = _steps(layers, config, rows), _rounding_seconds(layers, size, rates, config, rows, processes)
    step, own = config.learning.batch_size / processes * pace.learned, rows / processes
    return own * first + step * steps[0] + rounding, own * second + starts + step * steps[1] + again * rounding


def _steps(layers: Sequence[QuantLayer], config: Config, rows: int) -> tuple[float, float]:
    """Steps of learning in phase W and in phase A."""
    bits = min((layer.record.weight_bits or MAX_BITS for layer in layers), default=MAX_BITS)
    weights = config.weights.weight_iterations
    learned = learning_iterations(config, rows) * (1 + _following(config))  # a static source before one that follows t
    codes = weights if config.weights.rounding == "learned" and bits <= LEARNED_BITS else 0
    return weights if config.weights.rounding == "adaround" else 0, learned + codes


def _following(config: Config) -> float:
    """The share of units with sources that follow t, as far as one knows before."""
    if config.method == "auto":
        return 0.5
    return float(source_class(config.method).timed and config.method not in STATIC)


def _rounding_seconds(
    layers: Sequence[QuantLayer], size: UnitSize, rates: Rates, config: Config, samples: int, processes: int
) -> float:
    """Intervals of the weights, and closed-form rounding: what :mod:`ptq_tdq.recon.closed_form` does, operation by
    operation. Rows of inputs and of weights are shared by the processes, a factorization is not.
    """
    found = 0.0
    for layer in layers:
        if config.weights.weight_range == "mse":
            found += rates.search * layer.weight.numel()
        if config.weights.rounding not in ("gptq", "learned"):
            continue
        groups, outputs, columns, rows = _shape(layer, size, samples)
        blocks = -(-columns // COLUMNS)
        block, later = columns / blocks, 1 - 1 / blocks  # the share of columns that others come after
        pick = rates.pick if layer.weight.ndim > 2 else rates.pick_linear
        # moments of the inputs, about half of them; what is lost, and its moments, in later blocks of two kinds
        products = 1.125 * block + 2 * outputs * (2 + 3 * later)
        factors = len(FACTORS) / blocks + later
        solved = 2 / 3 * block**2 + outputs / processes * block * (4 + 2 * later + factors)
        found += groups * rows / processes * columns * (pick + rates.product * products)
        rounding = rates.rounding * factors * outputs / processes
        found += groups * columns * (TRIANGULAR * rates.double * solved + rounding)
    return found


def own_bytes() -> int:
    """What this process has allocated; where the system does not say, the most that it was."""
    found = [int(line.split()[1]) * 1024 for line in _lines("/proc/self/status") if line.startswith("RssAnon")]
    return found[0] if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
