"""Where the intervals of activations begin: at those of the artifact, else at what its quantizers see."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ptq_tdq.errors import ConfigError
from ptq_tdq.finetuning.config import KEEP, FinetuneConfig
from ptq_tdq.finetuning.quantizers import quantizer_class
from ptq_tdq.intervals import IntervalSource, Observed, source_class
from ptq_tdq.intervals.dynamic import Dynamic
from ptq_tdq.intervals.dynamic_statistics import DynamicStatistics
from ptq_tdq.intervals.dynamic_token import DynamicTokenRatio
from ptq_tdq.intervals.known import Known
from ptq_tdq.intervals.table import TableSource
from ptq_tdq.modules import ActivationQuantizer
from ptq_tdq.quantized_model import QuantizedModel
from ptq_tdq.recon.activations import observe
from ptq_tdq.records import LayerRecord, QuantizerRecord
from ptq_tdq.search import QParams

UNLEARNED = ("fixed", "step-table")  # methods whose tables stay as they are


def check_moving(records: Iterable[LayerRecord], config: FinetuneConfig) -> None:
    """Raise :class:`ConfigError` for a quantizer that moves intervals which a tensor itself puts where they are."""
    if not quantizer_class(config.quantizer).moves:
        return
    for quantizer in (q for layer in records for q in layer.inputs):
        method = _method(quantizer, config)
        if not source_class(method).timed and not issubclass(source_class(method), DynamicStatistics):
            raise ConfigError(
                f"The quantizer '{config.quantizer}' learns where intervals lie, and those of method '{method}' "
                f"({quantizer.name}) lie where each tensor puts them; choose another method, or quantizer lsq."
            )


def is_held(record: QuantizerRecord) -> bool:
    """Whether an interval must stay where it is against 0: that of x_t, of a softmax, and of tables that stay."""
    return record.from_zero or record.method in UNLEARNED


def begin_sources(
    quantized: QuantizedModel, config: FinetuneConfig, steps: Tensor, probe: Sequence[dict[str, Any]]
) -> None:
    """Give each activation quantizer a source that learns, of the method that the choices name.

    ``steps`` [K] are the time steps at which known intervals begin; others are observed in the calls ``probe``.
    """
    quantizers = quantized.quantizers()
    methods = {name: _method(quantizer.record, config) for name, quantizer in quantizers.items()}
    unknown = [quantizer for name, quantizer in quantizers.items() if _is_unknown(quantizer, methods[name])]
    observed = _observe(quantized, unknown, config, probe) if unknown else {}
    with torch.random.fork_rng(devices=[]):
        for number, (name, quantizer) in enumerate(quantizers.items()):
            torch.manual_seed(config.seed + number)
            method, own = methods[name], quantizer.record.method
            known = observed.get(name) or _known(quantizer, method, quantized.axis.length, config, steps)
            quantizer.source = _source(quantizer, method, known).to(quantized.device)
            gain_db = quantizer.record.gain_db if method == own else None
            quantizer.record = replace(quantizer.record, method=method, gain_db=gain_db)
    quantized.plan = tuple(
        replace(record, inputs=tuple(quantizers[q.name].record for q in record.inputs)) for record in quantized.plan
    )


def _method(record: QuantizerRecord, config: FinetuneConfig) -> str:
    return record.method if config.method == KEEP or record.method == "fixed" else config.method


def _table(quantizer: ActivationQuantizer, method: str) -> TableSource | None:
    """The artifact's table of what this method learns, intervals or ratios of them, if it has one."""
    source: Any = quantizer.source
    if issubclass(source_class(method), DynamicTokenRatio):
        source = getattr(source, "ratio", None)
    return source if isinstance(source, TableSource) else None


def _is_unknown(quantizer: ActivationQuantizer, method: str) -> bool:
    """Whether the artifact does not tell where the intervals of this method begin; ratios of tokens begin at 1."""
    cls = source_class(method)
    if method == quantizer.record.method or cls.by_token:
        return False
    return issubclass(cls, DynamicStatistics) or _table(quantizer, method) is None


def _known(quantizer: ActivationQuantizer, method: str, length: int, config: FinetuneConfig, steps: Tensor) -> Known:
    found = QParams(torch.ones(length), torch.zeros(length, dtype=torch.int32))
    if (table := _table(quantizer, method)) is not None:
        found = QParams(table.scale.cpu(), table.zero_point.cpu())
    return Known(steps.cpu(), found, quantizer.qtype, config.intervals)


def _source(quantizer: ActivationQuantizer, method: str, known: Observed) -> IntervalSource:
    source, goes_on = quantizer.source, method == quantizer.record.method
    assert source is not None
    if goes_on and method in UNLEARNED:
        return source
    if goes_on and isinstance(source, Dynamic) and not isinstance(source, DynamicTokenRatio):
        return source.requires_grad_(True)
    return source_class(method).build(method, known)


def _observe(
    quantized: QuantizedModel,
    quantizers: Collection[ActivationQuantizer],
    config: FinetuneConfig,
    probe: Sequence[dict[str, Any]],
) -> dict[str, Observed]:
    """What some quantizers see while all others quantize; a few calls have no running averages."""
    axis = quantized.axis
    steps = torch.cat([axis.t(call[axis.argument]) for call in probe]).cpu().unique()
    for quantizer in quantizers:
        if quantizer.record.range_method == "ema":
            quantizer.record = replace(quantizer.record, range_method="mse")

    def run() -> None:
        for call in probe:
            quantized(**call)

    return observe(quantizers, steps, config.intervals, axis.num_train_timesteps, run)
