"""What a denoiser predicts, whatever it returns."""

from __future__ import annotations

import pytest
import torch
from diffusers import ControlNetModel
from torch import Tensor

from ptq_tdq.calls import prediction, tensors_of
from ptq_tdq.errors import CalibrationSetError


@pytest.mark.parametrize("return_dict", [False, True])
def test_the_residuals_of_a_controlnet_are_one_prediction(return_dict: bool) -> None:
    torch.manual_seed(0)
    model = ControlNetModel(
        block_out_channels=(8, 16), layers_per_block=1, down_block_types=("DownBlock2D",) * 2, norm_num_groups=4,
        conditioning_embedding_out_channels=(4, 8), cross_attention_dim=8, attention_head_dim=4,
    )  # fmt: skip
    x, picture = torch.randn(2, 4, 8, 8), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        output = model(x, 10, torch.randn(2, 3, 8), picture, return_dict=return_dict)
    *residuals, _ = tensors_of(output)
    assert len({x.shape for x in residuals}) > 1
    assert torch.equal(prediction(output), torch.cat([x.flatten(1) for x in residuals], 1))


def test_complex_numbers_are_pairs_of_real_ones() -> None:
    x = torch.randn(2, 3, dtype=torch.complex64)
    assert torch.equal(prediction((x,)), torch.view_as_real(x))


def test_rows_of_different_sizes_are_no_prediction() -> None:
    rows: list[Tensor] = [torch.zeros(2, 3), torch.zeros(4, 3)]
    with pytest.raises(CalibrationSetError, match=r"different shapes \(\[2, 3\] and \[4, 3\]\)"):
        prediction([rows])
