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


class OwnConvolutions(nn.Module):
    """Convolutions by functions, with one number for both dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.time, self.last = nn.Conv2d(2, 4, 1), nn.Linear(1, 4), nn.Conv2d(4, 2, 1)
        self.down, self.up = nn.Parameter(torch.randn(4, 4, 3, 3)), nn.Parameter(torch.randn(4, 4, 4, 4))

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """sample [B, 2, H, W]."""
        y = self.first(sample) + self.time(timestep[:, None] / 1000)[:, :, None, None]
        y = nn.functional.conv2d(y.tanh(), self.down, None, (2,), padding=(1,), dilation=[1])
        result: Tensor = self.last(nn.functional.conv_transpose2d(y.tanh(), self.up, stride=(2,), padding=(1,)).tanh())
        return result


@torch.no_grad()
def test_convolutions_may_be_given_one_number_for_all_dimensions(
    tmp_path: Path, quantize_model: Callable[..., tuple[Artifact, Calls]]
) -> None:
    torch.manual_seed(0)
    model, x, t = OwnConvolutions(), torch.randn(2, 2, 8, 8), torch.tensor([900.0, 100.0])
    artifact, calls = quantize_model(model, sample=x, timestep=t)
    export_onnx(artifact, tmp_path / "model.onnx", "portable", calls, model=model)
    assert sqnr_db(build_quantized(artifact, model)(x, t), OnnxDenoiser(tmp_path / "model.onnx", threads=1)(x, t)) > 40


class Positions(nn.Module):
    """Writes positions into the memory of zeros, as CogVideoX does at sizes that its configuration does not have,
    clamps between an integer and a real number, and lets all tokens attend to each other without heads.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(2, 4), nn.Linear(4, 2)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """sample [B, N, 2]."""
        x = torch.clamp(self.first(sample).clamp(-2, 1.99), min=-0.5, max=2)
        where = x.new_zeros(1, x.shape[1] + 1, 4)
        where.data[:, 1:].copy_(torch.arange(4.0).expand(x.shape[1], 4))
        x = (x + where[:, 1:] + timestep[:, None, None] / 1000).tanh()
        result: Tensor = self.last(nn.functional.scaled_dot_product_attention(x, x, x))
        return result


@torch.no_grad()
def test_what_is_written_behind_autograd_s_back_is_in_the_graph(
    tmp_path: Path, quantize_model: Callable[..., tuple[Artifact, Calls]]
) -> None:
    torch.manual_seed(0)
    model, x, t = Positions(), torch.randn(2, 5, 2), torch.tensor([900.0, 100.0])
    artifact, calls = quantize_model(model, sample=x, timestep=t)
    export_onnx(artifact, tmp_path / "model.onnx", "portable", calls, model=model)
    assert sqnr_db(build_quantized(artifact, model)(x, t), OnnxDenoiser(tmp_path / "model.onnx", threads=1)(x, t)) > 40


class Casting(nn.Module):
    """Its middle is in half precision, as its own code says."""

    def __init__(self, auto: bool = False) -> None:
        super().__init__()
        self.auto = auto
        torch.manual_seed(0)
        self.first, self.time, self.last = nn.Linear(4, 8), nn.Linear(1, 8), nn.Linear(8, 4)
        self.inside = nn.Linear(8, 8).half()

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """sample [B, N, 4]."""
        y = self.first(sample) + self.time(timestep[:, None] / 1000)[:, None]
        if self.auto:
            with torch.autocast("cpu", torch.bfloat16):
                y = y + (y @ self.last.weight.T @ self.last.weight).float()
        result: Tensor = self.last(y + self.inside(y.to(torch.float16).tanh()).float())
        return result


@pytest.mark.parametrize("auto", [False, True])
@torch.no_grad()
def test_code_that_casts_to_half_precision_becomes_a_graph_in_float32(
    auto: bool, tmp_path: Path, quantize_model: Callable[..., tuple[Artifact, Calls]]
) -> None:
    torch.manual_seed(1)
    x, t = torch.randn(2, 3, 4), torch.tensor([900.0, 100.0])
    artifact, calls = quantize_model(Casting(auto), sample=x, timestep=t)
    export_onnx(artifact, tmp_path / "model.onnx", "portable", calls, model=Casting(auto))
    simulated = build_quantized(artifact, Casting(auto))
    with torch.autocast("cpu", torch.bfloat16):
        assert (x @ x.mT).dtype == torch.bfloat16, "autocast is as it was"
    assert sqnr_db(simulated(x, t), OnnxDenoiser(tmp_path / "model.onnx", threads=1)(x, t)) > 30


@pytest.mark.parametrize(
    "cast",
    [
        lambda x: x.to(torch.float16),
        lambda x: x.to(dtype=torch.bfloat16),
        lambda x: x.type(torch.float16),
        lambda x: x.half(),
        lambda x: x.bfloat16(),
        lambda x: torch.ones(2, dtype=torch.float16),
        lambda x: x.type("torch.HalfTensor"),
        lambda x: x.type(torch.BFloat16Tensor),
    ],
    ids=["to", "dtype", "type", "half", "bfloat16", "ones", "text", "class"],
)
def test_half_precision_is_asked_for_in_many_ways(cast: Callable[[Tensor], Tensor]) -> None:
    with InOtherWords():
        assert cast(torch.zeros(2)).dtype == torch.float32


@pytest.mark.parametrize("amounts", [(1, 2), (0, 3, 2, 0), (1, 1, 1, 1)])
def test_padding_repeats_what_torch_repeats(amounts: tuple[int, ...]) -> None:
    x = torch.randn(2, 3, 4, 5)[..., 0] if len(amounts) == 2 else torch.randn(2, 3, 4, 5)
    for mode in ("circular", "reflect", "constant"):
        expected = nn.functional.pad(x, amounts, mode)
        with InOtherWords():
            assert torch.equal(nn.functional.pad(x, amounts, mode), expected)


@pytest.mark.parametrize("lead", [(), (2,), (2, 3), (2, 1, 3)])
def test_attention_has_heads_in_a_graph(lead: tuple[int, ...]) -> None:
    q, k, v = torch.randn(*lead, 5, 4), torch.randn(*lead, 6, 4), torch.randn(*lead, 6, 3)
    for mask in (None, torch.randn(5, 6), torch.randn(*lead[:1], *[1] * len(lead[1:]), 5, 6)):
        expected = nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=2.0)
        with InOtherWords():
            torch.testing.assert_close(nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=2.0), expected)


class Tiles(nn.Module):
    """Goes on at the opposite edge, as denoisers of panoramas do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = (nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular") for _ in range(2))

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """sample [B, 2, H, W]."""
        y = self.first(sample) + timestep[:, None, None, None] / 1000
        result: Tensor = self.last(nn.functional.pad(y.tanh(), (0, 1, 0, 0), "circular"))[..., :-1]
        return result


@torch.no_grad()
def test_circular_padding_runs_everywhere(
    tmp_path: Path, quantize_model: Callable[..., tuple[Artifact, Calls]]
) -> None:
    torch.manual_seed(0)
    t = torch.tensor([900.0, 100.0])
    artifact, calls = quantize_model(Tiles(), sample=torch.randn(2, 2, 8, 8), timestep=t)
    export_onnx(artifact, tmp_path / "model.onnx", "portable", calls, model=Tiles())
    simulated, x = build_quantized(artifact, Tiles()), torch.randn(2, 2, 10, 7)
    for runtime in ("onnxruntime", "openvino"):
        graph = OnnxDenoiser(tmp_path / "model.onnx", runtime=runtime, threads=1)
        assert sqnr_db(simulated(x, t), graph(x, t)) > 40


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
