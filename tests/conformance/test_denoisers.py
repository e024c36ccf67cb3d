"""Each small denoiser of the shared table: its calls, its plan, its quantized model in both backends, and its artifact.

With ``PTQ_TDQ_FAMILIES=path`` a summary is written there; ``benchmarks/families.py`` makes a table of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from denoisers import DENOISERS, Denoiser, prediction
from families import keep
from torch import Tensor, nn

from ptq_tdq import Calls, QuantizedModel, calibrate, load_quantized, preset, record
from ptq_tdq.evaluate.metrics import sqnr_db
from ptq_tdq.intervals.table import TableSource
from ptq_tdq.modules import layer_kind

T = 1000
STEPS = (1000.0, 601.0, 201.0)
CONFIG = preset(
    "default",
    scheme="W8A8",
    method="step-table",
    rounding="nearest",
    round_again=False,
    activation_iterations=0,
    weight_range="minmax",
    activation_range="minmax",
    compute_dtype="float32",
)
MOST_OUTSIDE = 0.06  # of the multiply-accumulates with weights: experts that one tensor holds
CLOSE = 20  # dB, of W8A8 against full precision
# Sixty residual blocks of random weights amplify any error: 18 dB are left where only the weights have 8 bits.
CHAOTIC = {"Kandinsky3UNet": 5}
ALIKE = 25  # dB, of the integer backend against the simulated one: a code that flips flips others behind it
TIED = {"I2VGenXLUNet": 24}


@dataclass
class Case:
    """A denoiser with all that was made of it."""

    denoiser: Denoiser
    model: nn.Module
    calls: Calls
    predictions: list[Tensor]
    folder: Path
    quantized: QuantizedModel
    summary: dict[str, Any] = field(default_factory=dict)

    @property
    def pair(self) -> dict[str, Any]:
        """Arguments of a call with the first two recorded rows."""
        return self.calls.inputs(slice(0, 2))

    @cached_property
    @torch.no_grad()
    def simulated(self) -> list[Tensor]:
        """What the quantized model predicts in each call."""
        return [prediction(self.quantized(**self.calls.inputs(span))) for span in self.calls.chunks(2)]


@pytest.fixture(scope="module", params=DENOISERS, ids=lambda denoiser: denoiser.name)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    denoiser: Denoiser = request.param
    model, predictions = denoiser.build(), []
    with torch.no_grad():
        with record(model, time=denoiser.time_argument, num_train_timesteps=T) as calls:
            for t in STEPS:
                predictions.append(prediction(model(**denoiser.inputs(2, torch.full((2,), t)))))
        folder = tmp_path_factory.mktemp("artifact") / "out"
        quantized = calibrate(model, CONFIG, calls)
        quantized.save_pretrained(folder)
        made = Case(denoiser, model, calls, predictions, folder, quantized)
        made.summary["coverage"] = quantized.metrics["coverage"]
        yield made
    keep(denoiser.name, made.summary)


@torch.no_grad()
def test_rows_are_finite_and_independent_of_the_batch(case: Case) -> None:
    denoiser, t = case.denoiser, torch.tensor([801.0, 501.0, 101.0])
    together = prediction(case.model(**denoiser.inputs(3, t)))
    assert len(together) == 3
    assert bool(torch.isfinite(together).all())
    for row in range(3):
        alone = prediction(case.model(**denoiser.inputs(1, t[row : row + 1], first=row)))
        assert bool(torch.isfinite(alone).all())
        if not denoiser.mixes_rows:
            torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_recorded_calls_give_what_was_predicted(case: Case) -> None:
    assert len(case.calls) == 2 * len(STEPS)
    for span, expected in zip(case.calls.chunks(2), case.predictions, strict=True):
        assert torch.equal(prediction(case.model(**case.calls.inputs(span))), expected)
        t = STEPS[span.start // 2]
        assert case.calls.t[span].tolist() == [T - t if case.denoiser.reversed else t] * 2


@torch.no_grad()
def test_with_quantizers_off_it_is_the_original_bit_for_bit(case: Case) -> None:
    wrapped = QuantizedModel.copy_of(case.model, case.calls.axis, case.quantized.plan)
    for span, expected in zip(case.calls.chunks(2), case.predictions, strict=True):
        assert torch.equal(prediction(wrapped(**case.calls.inputs(span))), expected)


@torch.no_grad()
def test_quantized_to_8_bits_it_is_close_to_the_original(case: Case) -> None:
    found = case.summary["simulated_db"] = sqnr_db(case.predictions[0], case.simulated[0])
    assert CHAOTIC.get(case.denoiser.name, CLOSE) < found < 100, "close, and yet quantized"


@torch.no_grad()
def test_saved_and_loaded_it_gives_the_same_bits(case: Case) -> None:
    loaded = load_quantized(case.folder)
    for span, expected in zip(case.calls.chunks(2), case.simulated, strict=True):
        assert torch.equal(prediction(loaded(**case.calls.inputs(span))), expected)


def test_nearly_all_multiply_accumulates_are_quantized(case: Case) -> None:
    assert case.quantized.metrics["coverage"] >= 1 - MOST_OUTSIDE
    planned = {record.name for record in case.quantized.plan}
    left = [n for n, m in case.model.named_modules() if layer_kind(m) and n not in planned]
    said = [notice for notice in case.quantized.notices if "in floating point" in notice.lower()]
    assert not left or said, f"{left} stay in floating point, and nobody says so"


def test_tables_are_positive_finite_and_cover_the_schedule(case: Case) -> None:
    quantizers = case.quantized.quantizers()
    assert quantizers
    for quantizer in quantizers.values():
        assert isinstance(quantizer.source, TableSource)
        scale, zero_point = quantizer.source.scale, quantizer.source.zero_point
        assert scale.shape == zero_point.shape == (T + 1,) and scale.dtype == torch.float32
        assert bool((scale > 0).all() and scale.isfinite().all())
        assert int(zero_point.min()) >= 0 and int(zero_point.max()) <= quantizer.qtype.qmax


@torch.no_grad()
def test_in_integers_it_is_the_simulated_model(case: Case) -> None:
    integer = load_quantized(case.folder, backend="integer")
    found = sqnr_db(case.simulated[0], prediction(integer(**case.pair)))
    case.summary["integer_db"] = found
    assert found > min(TIED.get(case.denoiser.name, ALIKE), case.summary.get("simulated_db", ALIKE))
