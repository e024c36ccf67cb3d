"""The quantizer of one activation tensor: reads each sample's t from the call that runs, asks its source, quantizes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ptq_tdq.affine import fake_quantize
from ptq_tdq.intervals import IntervalSource
from ptq_tdq.observe import Observer
from ptq_tdq.records import QuantizerRecord
from ptq_tdq.scheme import QType
from ptq_tdq.timeaxis import present


class ActivationQuantizer(nn.Module):
    """Passes its input through until ``enabled``; with an ``observer`` it only watches.

    ``along`` is the dimension of x that the operation sums over: its vectors are tokens. It is None for a convolution,
    which sums over positions too: a token is then the whole sample. ``function`` is what quantizes; fine-tuning puts
    one with other gradients there.
    """

    def __init__(self, record: QuantizerRecord, along: int | None = -1) -> None:
        super().__init__()
        self.record, self.along = record, along
        self.qtype = QType(record.bits)
        self.enabled = False
        self.observer: Observer | None = None
        self.source: IntervalSource | None = None
        self.function: Callable[[Tensor, Tensor, Tensor, QType], Tensor] = fake_quantize

    @property
    def by_rows(self) -> bool:
        """Whether it does to some rows along the last dimension what it does to them among all others."""
        if not self.enabled or self.source is None or self.observer is not None:
            return False
        apart = not self.source.by_sample and not (self.source.by_token and self.along != -1)
        return apart and self.function is fake_quantize

    def forward(self, x: Tensor, *interval: Tensor) -> Tensor:
        """x [B, ...] -> the same shape, on the grid of the interval at each sample's t, where no other is given."""
        if self.observer is not None:
            self.observer.see(x if self.observer.vectors is None else self._tokens(x), present(len(x), x.device))
            return x
        if not self.enabled or self.source is None:
            return x
        scale, zero_point = interval or self.interval(x)
        return self.function(x, self._beside(scale, x), self._beside(zero_point, x), self.qtype)

    def interval(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero_point of each sample [B], or of each token of x."""
        assert self.source is not None
        with torch.autocast(x.device.type, enabled=False):  # intervals are float32 whatever the products are
            seen = self._tokens(x) if self.source.by_token else x
            scale, zero_point = self.source(present(len(x), x.device), seen)
        return scale, zero_point

    def _tokens(self, x: Tensor) -> Tensor:
        """x as [B, ..., K], its tokens last."""
        return x.flatten(1) if self.along is None else x.movedim(self.along, -1)

    def _beside(self, values: Tensor, x: Tensor) -> Tensor:
        """Values of samples [B] or of tokens in the shape that broadcasts against x."""
        if values.ndim == 1 or self.along is None:
            return values.view(-1, *(1,) * (x.ndim - 1))
        return values.unsqueeze(self.along)
