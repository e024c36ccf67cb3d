"""``dynamic``: the interval from each sample's own absolute maximum at run time (supp Table 1, variant a)."""

from __future__ import annotations

import torch
from torch import Tensor

from ptq_tdq.affine import end_scales
from ptq_tdq.errors import ModelError
from ptq_tdq.intervals.base import IntervalSource, Observed, source_class
from ptq_tdq.scheme import QType

Form = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def forms(tensors: dict[str, Tensor]) -> Form:
    """Types and shapes of tensors by name."""
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


class Dynamic(IntervalSource):
    """The least scale at which no value of the sample is clipped, with the zero point of the static interval.

    For a symmetric zero point this is abs-max; values on a side that the zero point leaves no codes for are clipped.
    """

    pattern = "dynamic"
    timed = False
    by_sample = True

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

    @classmethod
    def form(cls, length: int) -> Form:
        """The form of :attr:`generator`, where tables have ``length`` entries."""
        with torch.device("meta"):
            return forms(cls(torch.zeros((), dtype=torch.int32), QType(8)).generator)

    @classmethod
    def restore(cls, zero_point: Tensor, qtype: QType, generator: dict[str, Tensor]) -> Dynamic:
        """A source from what is kept of it."""
        with torch.device("meta"):  # no random start
            source = cls(zero_point, qtype)
        source.load_state_dict({"zero_point": zero_point, **generator}, assign=True)
        return source

    def freeze(self, num_train_timesteps: int) -> None:
        """Learning is over: what depends on t alone may become a table."""

    def forward(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        rows = x.flatten(1)
        down, up = end_scales(rows.amin(1), rows.amax(1), self.zero_point, self.qtype)
        scale = torch.maximum(down, up).clamp(min=torch.finfo(torch.float32).tiny)
        return scale, self.zero_point.expand(len(rows))


def restore_dynamic(
    method: str, zero_point: Tensor, qtype: QType, generator: dict[str, Tensor], length: int
) -> Dynamic:
    """A source of a dynamic ``method`` from what is kept of it, where tables have ``length`` entries.

    Raises :class:`ModelError` for what is kept of another method's.
    """
    cls = source_class(method)
    assert issubclass(cls, Dynamic)
    if forms(generator) != cls.form(length):
        raise ModelError(f"The saved network of a quantizer is not that of method '{method}'; calibrate again.")
    return cls.restore(zero_point, qtype, generator).requires_grad_(False).eval()
