"""``duq``: a learned truncation and a learned output scale (Park and Yoo, PROFIT, ECCV 2020)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ptq_tdq.affine import fake_quantize
from ptq_tdq.finetuning.quantizers.base import Quantizer
from ptq_tdq.scheme import QType


class DuQ(Quantizer):
    """``b round(clip(x / a) n) / n``: x is rounded in steps of a / n, and codes stand for steps of b / n.

    With a = n s and b = r a, r learned as its logarithm: r times what the codes of s stand for. So b follows t as a
    does, and the weight behind the activation takes r over. Operands of attention products have r = 1.
    """

    name = "duq"

    def __init__(self, absorbs: bool = False, held: bool = False) -> None:
        super().__init__(absorbs, held)
        self.ratio = nn.Parameter(torch.zeros(())) if absorbs else None

    def __call__(self, x: Tensor, scale: Tensor, zero_point: Tensor, qtype: QType) -> Tensor:
        quantized = fake_quantize(x, scale, zero_point, qtype)
        return quantized if self.ratio is None else quantized * self.ratio.exp().to(x.dtype)
