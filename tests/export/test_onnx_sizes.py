"""Which sizes of a graph are free: those at which it is right, whatever torch's exporter takes for granted."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from ptq_tdq.artifacts import Artifact
from ptq_tdq.calls import Calls
from ptq_tdq.errors import ModelError
from ptq_tdq.evaluate.metrics import sqnr_db
from ptq_tdq.export.onnx import OnnxDenoiser, export_onnx, export_onnx_steps
from ptq_tdq.load import build_quantized

T = torch.tensor([900.0, 100.0, 400.0])
# By what a model does with its image: the free sizes, and the function.
MIXES: dict[str, tuple[list[str], Callable[[Tensor], Tensor]]] = {
    "a step along the height": (["height", "width"], lambda h: h.flip(2).cumsum(3)),
    "pooled to a size": ([], lambda h: interpolate(adaptive_avg_pool2d(h, 2), h.shape[-2:])),
    "halved, right at even sizes": (
        [],
        lambda h: interpolate(interpolate(h, [h.shape[2] // 2, h.shape[3] // 2], mode="area"), h.shape[-2:]),
    ),
    "pooled along the width": (["height"], lambda h: adaptive_avg_pool2d(h, (None, 1)).expand_as(h)),
    "rolled by a half": ([], lambda h: h.roll(h.shape[2] // 2, 2)),
    "in two pieces": ([], lambda h: torch.cat(h.chunk(2, 2)[::-1], 2)),
}


class Mixed(nn.Module):
    """Mixes the pixels of its image in one of some ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.inside, self.last = nn.Conv2d(2, 8, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 2, 1)
        _, self.mix = MIXES[how]

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """sample [B, 2, H, W]."""
        h = self.first(sample) + timestep[:, None, None, None] / 1000
        result: Tensor = self.last(self.inside(h + 3 * self.mix(h)).tanh())
        return result


@torch.no_grad()
@pytest.mark.parametrize("how", MIXES)
def test_a_size_is_free_where_the_graph_is_right(
    how: str,
    tmp_path: Path,
    quantize_model: Callable[..., tuple[Artifact, Calls]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    free, _ = MIXES[how]
    artifact, calls = quantize_model(Mixed(how), sample=torch.randn(3, 2, 8, 8), timestep=T)
    with caplog.at_level(logging.WARNING):
        export_onnx(artifact, tmp_path / "model.onnx", "portable", calls, model=Mixed(how))
    graph, simulated = OnnxDenoiser(tmp_path / "model.onnx", threads=1), build_quantized(artifact, Mixed(how))
    assert graph.facts["free_sizes"] == ["batch", *free]
    for name, size in {"": (8, 8), "height": (11, 8), "width": (8, 16)}.items():
        x = torch.randn(2, 2, *size)
        if name in ("", *free):
            assert sqnr_db(simulated(x, T[:2]), graph(x, T[:2])) > 30
        else:
            with pytest.raises(ModelError, match="The graph takes sample in the shape"):
                graph(x, T[:2])
    assert ("height and width as in these calls alone" in caplog.text) == (how.startswith(("pooled to", "halved")))


@torch.no_grad()
def test_graphs_of_a_folder_have_the_right_sizes_too(
    tmp_path: Path, quantize_model: Callable[..., tuple[Artifact, Calls]]
) -> None:
    x, how = torch.randn(3, 2, 8, 8), "pooled to a size"
    artifact, calls = quantize_model(Mixed(how), sample=x, timestep=T)
    export_onnx_steps(artifact, tmp_path / "graphs", calls, model=Mixed(how))
    graph = OnnxDenoiser(tmp_path / "graphs", threads=1)
    assert graph.facts["free_sizes"] == ["batch"]
    assert sqnr_db(build_quantized(artifact, Mixed(how))(x, T), graph(x, T)) > 30


class Guided(nn.Module):
    """Adds the mean of two rows of text for each sample, one behind the other."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.read = nn.Conv2d(2, 8, 1), nn.Conv2d(8, 2, 1), nn.Linear(4, 8)

    def forward(self, sample: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        """sample [B, 2, H, W], text [2 B, 4]."""
        h = self.first(sample) + timestep[:, None, None, None] / 1000
        result: Tensor = self.last((h + self.read(text).unflatten(0, (-1, 2)).mean(1)[:, :, None, None]).tanh())
        return result


@torch.no_grad()
def test_inputs_with_several_rows_for_each_sample_grow_with_the_batch(
    tmp_path: Path, quantize_model: Callable[..., tuple[Artifact, Calls]]
) -> None:
    x, text = torch.randn(3, 2, 8, 8), torch.randn(6, 4)
    artifact, calls = quantize_model(Guided(), sample=x, timestep=T, text=text)
    export_onnx(artifact, tmp_path / "model.onnx", "portable", calls, model=Guided())
    graph, simulated = OnnxDenoiser(tmp_path / "model.onnx", threads=1), build_quantized(artifact, Guided())
    assert "rows of text" in graph.facts["free_sizes"]
    assert sqnr_db(simulated(x[:2], T[:2], text[:4]), graph(x[:2], T[:2], text[:4])) > 30
