"""PTQD's correction of a model, estimated where its intervals were: on the calibration set."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import nn

from ptq_tdq.calib_data import CalibrationSet
from ptq_tdq.correction import Call, Corrected, fit_correction
from ptq_tdq.errors import ConfigError
from ptq_tdq.evaluate.trajectories import BATCH

CorrectionName = Literal["none", "ptqd"]


def read_correction(name: str) -> CorrectionName:
    """A correction by its name; raises :class:`ConfigError`."""
    for known in ("none", "ptqd"):
        if name == known:
            return known
    raise ConfigError(f"correction must be one of none, ptqd. Got {name!r} instead.")


@torch.no_grad()
def corrected(name: CorrectionName, full: nn.Module, quantized: nn.Module, samples: CalibrationSet) -> nn.Module:
    """``quantized`` with the correction ``name``; "none" returns it unchanged."""

    def calls() -> Iterator[Call]:
        for start in range(0, len(samples.x), BATCH):
            rows = slice(start, start + BATCH)
            x, t = samples.x[rows], samples.t[rows]
            labels = {} if samples.class_labels is None else {"class_labels": samples.class_labels[rows]}
            yield t, *(unet(x, t, return_dict=False, **labels)[0] for unet in (full, quantized))

    return quantized if name == "none" else Corrected(quantized, fit_correction(calls()))
