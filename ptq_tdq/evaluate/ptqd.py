"""PTQD's correction of a model, estimated where its intervals were: on the calibration set."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from torch import nn

from ptq_tdq.calib_data import LoadedModel
from ptq_tdq.calls import Calls
from ptq_tdq.correction import Call, Corrected, fit_correction
from ptq_tdq.errors import ConfigError
from ptq_tdq.evaluate.trajectories import replayed

CorrectionName = Literal["none", "ptqd"]


def read_correction(name: str) -> CorrectionName:
    """A correction by its name; raises :class:`ConfigError`."""
    for known in ("none", "ptqd"):
        if name == known:
            return known
    raise ConfigError(f"correction must be one of none, ptqd. Got {name!r} instead.")


def corrected(name: CorrectionName, model: LoadedModel, quantized: nn.Module, calls: Calls) -> nn.Module:
    """``quantized`` with the correction ``name``; "none" returns it unchanged.

    The correction compares it with the ``model`` that it was made from, on the ``calls`` of its calibration set.
    """

    def pairs() -> Iterator[Call]:
        t, size = calls.t, model.sampler.batch
        both = zip(replayed(model.denoiser, calls, size), replayed(quantized, calls, size), strict=True)
        for (rows, full), (_, mine) in both:
            yield t[rows], full, mine

    return quantized if name == "none" else Corrected(quantized, fit_correction(pairs()), calls.axis)
