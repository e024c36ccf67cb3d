"""What torch's exporter writes wrongly is said in other words that mean the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ptq_tdq.artifacts import Artifact
from ptq_tdq.calls import Calls
from ptq_tdq.evaluate.metrics import sqnr_db
from ptq_tdq.export.onnx import OnnxDenoiser, export_onnx
from ptq_tdq.export.onnx.rewrite import InOtherWords
from ptq_tdq.load import build_quantized


@pytest.mark.parametrize("dim", [None, 0, 1, 2, -1, -3])
def test_each_value_is_repeated_as_torch_does_it(dim: int | None) -> None:
    x = torch.arange(24).reshape(2, 3, 4)
    counts = torch.arange(x.numel() if dim is None else x.shape[dim])
    for repeats in (1, 3, counts):
        expected = x.repeat_interleave(repeats, dim)
        with InOtherWords():
            assert torch.equal(x.repeat_interleave(repeats, dim), expected)
            assert torch.equal(torch.repeat_interleave(x, repeats, dim=dim, output_size=None), expected)


class Frames(nn.Module):
    """Repeats the embedding of t for each frame, of which there may be any number, as video models do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.time, self.last = nn.Linear(4, 8), nn.Linear(1, 8), nn.Linear(8, 4)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """sample [B, 4, frames]."""
        t = self.time(timestep[:, None] / 1000).repeat_interleave(sample.shape[2], dim=0)
        y = self.last((self.first(sample.transpose(1, 2).flatten(0, 1)) + t).tanh())
        return y.unflatten(0, (sample.shape[0], -1)).transpose(1, 2)


@torch.no_grad()
def test_a_number_of_repeats_may_vary_in_a_graph(
    tmp_path: Path, quantize_model: Callable[..., tuple[Artifact, Calls]]
) -> None:
    torch.manual_seed(0)
    t = torch.tensor([900.0, 100.0])
    artifact, calls = quantize_model(Frames(), sample=torch.randn(2, 4, 3), timestep=t)
    export_onnx(artifact, tmp_path / "model.onnx", "portable", calls, model=Frames())
    graph, simulated = OnnxDenoiser(tmp_path / "model.onnx", threads=1), build_quantized(artifact, Frames())
    assert graph.facts["free_sizes"] == ["batch", "size_2"]
    for frames in (3, 5):
        x = torch.randn(2, 4, frames)
        assert sqnr_db(simulated(x, t), graph(x, t)) > 40
