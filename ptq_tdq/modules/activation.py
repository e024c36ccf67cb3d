"""The quantizer of one activation tensor: reads each sample's t from the call that runs, asks its source, quantizes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ptq_tdq.affine import fake_quantize
from ptq_tdq.intervals import IntervalSource
from ptq_tdq.observe import Observer
from ptq_tdq.records import QuantizerRecord
from ptq_tdq.scheme import QType
from ptq_tdq.timeaxis import present


class ActivationQuantizer(nn.Module):
    """Passes its input through until ``enabled``; with an ``observer`` it only watches."""

    def __init__(self, record: QuantizerRecord) -> None:
        super().__init__()
        self.record = record
        self.qtype = QType(record.bits)
        self.enabled = False
        self.observer: Observer | None = None
        self.source: IntervalSource | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x [B, ...] -> the same shape, on the grid of the interval at each sample's t."""
        if self.observer is not None:
            self.observer.see(x, present(len(x), x.device))
            return x
        if not self.enabled or self.source is None:
            return x
        with torch.autocast(x.device.type, enabled=False):  # intervals are float32 whatever the products are
            scale, zero_point = self.source(present(len(x), x.device), x)
        shape = (len(x),) + (1,) * (x.ndim - 1)
        return fake_quantize(x, scale.view(shape), zero_point.view(shape), self.qtype)
