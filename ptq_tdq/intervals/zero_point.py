"""Zero points of sources whose scale follows t: a table, or the value that keeps the low end of the range."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ptq_tdq.scheme import QType
from ptq_tdq.timeaxis import lookup


class TabledZeroPoint(nn.Module):
    """int32 [T], looked up by t."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.register_buffer("table", table)
        self.table: Tensor

    def forward(self, t: Tensor, scale: Tensor) -> Tensor:
        """``t`` and ``scale`` [B] -> int32 [B]."""
        return lookup(self.table, t)


class LowEndZeroPoint(nn.Module):
    """The zero point with which a scale's range begins at the ``low`` end [T] (<= 0), to the nearest level.

    While the scale is learned, the high end moves and the low end stays: a shorter range does not begin to clip the
    small negative tail of a SiLU, which no other interval of the range makes up for.
    """

    def __init__(self, low: Tensor, qtype: QType) -> None:
        super().__init__()
        self.qtype = qtype
        self.register_buffer("low", low)
        self.low: Tensor

    def forward(self, t: Tensor, scale: Tensor) -> Tensor:
        """``t`` and ``scale`` [B] -> int32 [B]; the scale's gradient is LSQ's, as for a fixed zero point."""
        levels = torch.round(-lookup(self.low, t) / scale.detach())
        return (levels + self.qtype.qmin).clamp(self.qtype.qmin, self.qtype.qmax).to(torch.int32)
