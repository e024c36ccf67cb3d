"""``qil``: quantization interval learning (Jung et al., CVPR 2019)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ptq_tdq.finetuning.quantizers.base import Quantizer, with_gradient_of
from ptq_tdq.scheme import QType


class QIL(Quantizer):
    """Centre c and half-width d of the interval learn.

    x_hat = clip((x - (c - d)) / (2 d), 0, 1) is rounded to n = qmax - qmin steps (section 3, gamma = 1), with d x_hat /
    d c = -1 / (2 d) and d x_hat / d d = -(x - c) / (2 d^2) inside, and 0 outside, where values are pruned or clipped.
    What the codes stand for, 2 d x_hat + (c - d), follows the interval and is differentiated too. So d learns as LSQ's
    scale does, and c from values outside. With the gradients of x_hat alone, right where layers around say what a code
    stands for, an interval of t would go on and on to where its codes are larger, and what they stand for is not.

    c = s ((qmin + qmax) / 2 - z) and d = s n / 2, so both follow t as s does. c learns on its own through the zero
    point (:meth:`moved`), which stays a code: the interval holds 0.
    """

    name = "qil"
    moves = True

    def __init__(self, absorbs: bool = False, held: bool = False) -> None:
        super().__init__(absorbs, held)
        self.shift = None if held else nn.Parameter(torch.zeros(()))

    def __call__(self, x: Tensor, scale: Tensor, zero_point: Tensor, qtype: QType) -> Tensor:
        zero, steps = self.moved(zero_point, qtype), x.to(scale.dtype) / scale
        inner = (steps + zero).clamp(qtype.qmin, qtype.qmax)  # qmin + n x_hat
        code = (steps.round() + zero).clamp(qtype.qmin, qtype.qmax).detach()
        return (scale * (with_gradient_of(inner, code) - zero)).to(x.dtype)
