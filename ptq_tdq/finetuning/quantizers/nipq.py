"""``nipq``: noise in the place of rounding (Shin et al., CVPR 2023)."""

from __future__ import annotations

import torch
from torch import Tensor

from ptq_tdq.affine import fake_quantize
from ptq_tdq.finetuning.quantizers.base import Quantizer, ends
from ptq_tdq.scheme import QType


class NIPQ(Quantizer):
    """Inside the range x gets uniform noise of one step, outside it is clipped; both teach the scale.

    x_hat = x + s e, e ~ U(-1/2, 1/2), within s (qmin - z) and s (qmax - z). In the last part of the iterations
    intervals are frozen and activations rounded, so that the weights learn with the codes that stay.
    """

    name = "nipq"
    freezes = True

    def __call__(self, x: Tensor, scale: Tensor, zero_point: Tensor, qtype: QType) -> Tensor:
        if self.frozen:
            return fake_quantize(x, scale.detach(), zero_point, qtype)
        low, high = (end.to(x.dtype) for end in ends(scale, zero_point, qtype))
        noise = (torch.rand_like(x) - 0.5).masked_fill((x <= low) | (x >= high), 0.0)
        return x.clamp(low, high) + noise * scale.to(x.dtype)
