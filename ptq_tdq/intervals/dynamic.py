"""``dynamic``: the interval from each sample's own absolute maximum at run time (supp Table 1, variant a)."""

from __future__ import annotations

import torch
from torch import Tensor

from ptq_tdq.errors import ModelError
from ptq_tdq.intervals.base import IntervalSource, Observed, source_class
from ptq_tdq.scheme import QType


class Dynamic(IntervalSource):
    """The least scale at which no value of the sample is clipped, with the zero point of the static interval.

    For a symmetric zero point this is abs-max; values on a side that the zero point leaves no codes for are clipped.
    """

    pattern = "dynamic"
    timed = False

    def __init__(self, zero_point: Tensor, qtype: QType) -> None:
        super().__init__()
        self.qtype = qtype
        self.register_buffer("zero_point", zero_point)
        self.zero_point: Tensor

    @classmethod
    def build(cls, method: str, observed: Observed) -> Dynamic:
        return cls(observed.static.zero_point.clone(), observed.qtype)  # one tensor in two places cannot be saved

    @property
    def generator(self) -> dict[str, Tensor]:
        """What is kept of it beside the zero point: the tensors of its network, if it has one."""
        return {name: tensor for name, tensor in self.state_dict().items() if name != "zero_point"}

    def forward(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        rows = x.flatten(1)
        above, below = self.qtype.qmax - self.zero_point, self.zero_point - self.qtype.qmin
        # a side without codes is clipped; dividing by infinity asks the device nothing, unlike a condition
        up, down = (
            extreme.to(torch.float32) / torch.where(codes > 0, codes.to(torch.float32), torch.inf)
            for extreme, codes in ((rows.amax(1), above), (-rows.amin(1), below))
        )
        scale = torch.maximum(up, down).clamp(min=torch.finfo(torch.float32).tiny)
        return scale, self.zero_point.expand(len(rows))


def restore_dynamic(method: str, zero_point: Tensor, qtype: QType, generator: dict[str, Tensor]) -> Dynamic:
    """A source of a dynamic ``method`` from what is kept of it; raises :class:`ModelError` for another network's."""
    cls = source_class(method)
    assert issubclass(cls, Dynamic)
    with torch.device("meta"):  # no random start
        source = cls(zero_point, qtype)
    expected = {name: (tensor.dtype, tensor.shape) for name, tensor in source.generator.items()}
    if {name: (tensor.dtype, tensor.shape) for name, tensor in generator.items()} != expected:
        raise ModelError(f"The saved network of a quantizer is not that of method '{method}'; calibrate again.")
    source.load_state_dict({"zero_point": zero_point, **generator}, assign=True)
    return source.requires_grad_(False).eval()
