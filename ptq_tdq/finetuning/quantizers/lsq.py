"""``lsq``: learned step size (arXiv 1902.08153)."""

from __future__ import annotations

from torch import Tensor

from ptq_tdq.affine import learned_step_size
from ptq_tdq.finetuning.quantizers.base import Quantizer
from ptq_tdq.scheme import QType


class LSQ(Quantizer):
    """The scale learns from rounding and from clipping."""

    name = "lsq"

    def __call__(self, x: Tensor, scale: Tensor, zero_point: Tensor, qtype: QType) -> Tensor:
        return learned_step_size(x, scale, zero_point, qtype)
