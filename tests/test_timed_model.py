"""A module around a denoiser: in which dtype it computes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ptq_tdq.errors import NonFiniteError
from ptq_tdq.timeaxis import TimeAxis
from ptq_tdq.timed_model import TimedModel, check_finite


class Unnamed(nn.Module):
    """A table in float32 before all else, which is in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer = nn.Parameter(torch.zeros(4)), nn.Linear(4, 4, dtype=torch.bfloat16)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.layer(x) + self.table.to(x.dtype)


class Mixed(Unnamed):
    """The same with a word for it, as diffusers loads many transformers."""

    dtype = torch.bfloat16


def test_a_model_is_given_inputs_of_the_dtype_that_it_names() -> None:
    model = Mixed()
    timed, x, t = TimedModel(model, TimeAxis("t")), torch.randn(2, 4, dtype=torch.bfloat16), torch.tensor([5])
    assert timed.dtype == torch.bfloat16
    assert torch.equal(timed(x, t), model(x, t))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_that_names_no_dtype_is_cast_to_only_where_all_of_it_is_float32(dtype: torch.dtype) -> None:
    model = Unnamed()
    model.layer.to(dtype)
    timed, x, t = TimedModel(model, TimeAxis("t")), torch.randn(2, 4, dtype=dtype), torch.tensor([5])
    assert torch.equal(timed(x, t), model(x, t))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_a_float32_model_takes_inputs_of_any_floating_dtype(dtype: torch.dtype) -> None:
    """And gives back one of half precision, which a pipeline decodes in that."""
    model = Mixed().float()
    timed, x = TimedModel(model, TimeAxis("t")), torch.randn(2, 4, dtype=dtype)
    given = torch.float32 if dtype == torch.float64 else dtype
    assert torch.equal(timed(x, torch.tensor([5])), model(x.float(), torch.tensor([5])).to(given))


def test_all_of_an_output_is_of_the_dtype_of_x() -> None:
    @dataclass
    class Output:
        sample: Tensor
        beside: tuple[Tensor, Tensor]

    class Several(Mixed):
        def forward(self, x: Tensor, t: Tensor) -> Any:
            return Output(self.layer(x), (self.layer(x), torch.tensor([1, 2])))

    output = TimedModel(Several().float(), TimeAxis("t"))(torch.randn(2, 4).half(), torch.tensor([5]))
    assert [x.dtype for x in (output.sample, *output.beside)] == [torch.float16, torch.float16, torch.int64]


def test_finite_numbers_and_masks_of_scores_are_taken() -> None:
    for taken in ([0.0, -1e4], [0.0, -math.inf], [-math.inf]):
        check_finite(torch.tensor(taken))
    for refused in ([0.0, math.nan], [0.0, math.inf], [0.5, -math.inf]):
        with pytest.raises(NonFiniteError, match="given NaN or Inf"):
            check_finite(torch.tensor(refused))
