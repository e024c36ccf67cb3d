"""Models whose code reads values of tensors: lengths of prompts, decisions, which expert a token goes to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ptq_tdq.artifacts import Artifact
from ptq_tdq.calls import Calls
from ptq_tdq.errors import ModelError
from ptq_tdq.evaluate.metrics import sqnr_db
from ptq_tdq.export.onnx import OnnxDenoiser, export_onnx
from ptq_tdq.export.onnx.places import rounds
from ptq_tdq.export.onnx.reads import listen
from ptq_tdq.load import build_quantized

T = torch.tensor([900.0, 100.0, 400.0, 400.0])


class Prompts(nn.Module):
    """Reads how long each prompt is, where its words are, and whether there are pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.text, self.words, self.image, self.last = (nn.Linear(4, 4) for _ in range(5))

    def forward(self, sample: Tensor, timestep: Tensor, text: Tensor, mask: Tensor, image: Tensor) -> Tensor:
        """sample [B, N, 4], text [B, 5, 4], mask [B, 5], image [B, 4]."""
        texts = zip(text, mask.sum(1).tolist(), strict=True)
        prompt = torch.stack([words[:length].mean(0) for words, length in texts])
        chosen = torch.stack([words[own].amax(0) for words, own in zip(text, mask.bool(), strict=True)])
        y = self.first(sample) + (self.text(prompt) + self.words(chosen))[:, None] + timestep[:, None, None] / 1000
        if not (image == 0).all():
            y = y + self.image(image)[:, None]
        result: Tensor = self.last(y.tanh())
        return result


def prompts(lengths: list[int]) -> dict[str, Tensor]:
    """A call with prompts of some lengths."""
    mask = (torch.arange(5) < torch.tensor(lengths)[:, None]).long()
    shapes = {"sample": (3, 4), "text": (5, 4), "image": (4,)}
    return {name: torch.randn(len(lengths), *shape) for name, shape in shapes.items()} | {"mask": mask}


@torch.no_grad()
def test_prompts_as_long_as_the_recorded_ones(
    tmp_path: Path,
    quantize_model: Callable[..., tuple[Artifact, Calls]],
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    torch.manual_seed(0)
    artifact, calls = quantize_model(Prompts(), timestep=T[:3], **prompts([2, 4, 2]))
    export_onnx(artifact, tmp_path / "model.onnx", "portable", calls, model=Prompts())
    assert "reads the values of mask" in caplog.text
    assert "def forward" not in capsys.readouterr().err  # of the graph that torch has not finished
    graph, simulated = OnnxDenoiser(tmp_path / "model.onnx", threads=1), build_quantized(artifact, Prompts())
    assert [leaf.name for leaf in graph.call.held()] == ["mask"]
    for lengths in ([4], [4, 2, 2, 2]):
        given = prompts(lengths) | {"timestep": T[: len(lengths)]}
        assert sqnr_db(simulated(**given), graph(**given)) > 40
    with pytest.raises(ModelError, match=r"mask.*export it with such calls"):
        graph(timestep=T[:2], **prompts([2, 3]))
    with pytest.raises(ModelError, match="decides by values"):
        graph(timestep=T[:1], **prompts([2]) | {"image": torch.zeros(1, 4)})


@torch.no_grad()
def test_a_graph_holds_few_prompts(tmp_path: Path, quantize_model: Callable[..., tuple[Artifact, Calls]]) -> None:
    artifact, calls = quantize_model(Prompts(), timestep=torch.full((5,), 500.0), **prompts([1, 2, 3, 4, 5]))
    with pytest.raises(ModelError, match=r"At most 4 .* have 5; .* mask.* one prompt"):
        export_onnx(artifact, tmp_path / "model.onnx", "portable", calls, model=Prompts())
    assert list(tmp_path.iterdir()) == []


class Experts(nn.Module):
    """Sorts tokens by expert; while it learns, each expert takes its own by a mask."""

    def __init__(self, learns: bool) -> None:
        super().__init__()
        self.learns = learns
        self.gate, self.experts = nn.Linear(4, 3), nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        """x [tokens, 4]."""
        own = self.gate(x).argmax(-1)
        if self.training and self.learns:
            y = torch.empty_like(x)
            for i, expert in enumerate(self.experts):
                y[own == i] = expert(x[own == i])
            return y
        order = own.argsort()
        parts = x[order].split(own.bincount(minlength=3).tolist())
        done = [expert(part) for expert, part in zip(self.experts, parts, strict=True)]
        return torch.cat(done)[order.argsort()]


class Mixture(nn.Module):
    def __init__(self, learns: bool = True) -> None:
        super().__init__()
        self.first, self.mixture, self.last = nn.Linear(4, 4), Experts(learns), nn.Linear(4, 4)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """sample [B, N, 4]."""
        y = self.first(sample) + timestep[:, None, None] / 1000
        result: Tensor = self.last(self.mixture(y.flatten(0, 1)).unflatten(0, y.shape[:2]).tanh())
        return result


@torch.no_grad()
def test_tokens_go_to_their_experts(tmp_path: Path, quantize_model: Callable[..., tuple[Artifact, Calls]]) -> None:
    torch.manual_seed(0)
    artifact, calls = quantize_model(Mixture(), sample=torch.randn(2, 30, 4), timestep=T[:2])
    export_onnx(artifact, tmp_path / "model.onnx", "portable", calls, model=Mixture())
    graph, simulated = OnnxDenoiser(tmp_path / "model.onnx", threads=1), build_quantized(artifact, Mixture())
    x = torch.randn(4, 30, 4)
    for t in (T, T[[1, 1, 1, 1]]):
        assert sqnr_db(simulated(x, t), graph(x, t)) > 40


def test_sizes_that_follow_from_x_are_one_sentence_and_no_file(
    tmp_path: Path, quantize_model: Callable[..., tuple[Artifact, Calls]]
) -> None:
    artifact, calls = quantize_model(Mixture(learns=False), sample=torch.randn(2, 30, 4), timestep=T[:2])
    with pytest.raises(ModelError, match="depends on values of tensors") as caught:
        export_onnx(artifact, tmp_path / "graph.onnx", "portable", calls, model=Mixture(learns=False))
    assert len(str(caught.value).splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


class Reader(nn.Module):
    def forward(self, given: dict[str, Tensor]) -> None:
        x, mask, y = given["x"], given["mask"], torch.zeros(3)
        y[1:] = mask
        (y * 2).tolist()
        bool((x + y > 0).all())
        torch.zeros_like(x).sum().item()
        x[(mask * 2).repeat(2)[:3] > 1]


def test_what_is_read_follows_from_its_inputs() -> None:
    reads = listen(Reader(), {"x": torch.ones(3), "mask": torch.ones(2)})
    found = [(read.name, set(read.sources)) for read in reads]
    assert found[:3] == [("item", {"mask"})] * 3
    assert found[3:] == [("bool", {"x", "mask"}), ("item", set()), ("mask as an index", {"mask"})]


@given(st.lists(st.integers(0, 2), max_size=8))
@settings(max_examples=50, deadline=None)
def test_each_sample_runs_once_in_its_place(places: list[int]) -> None:
    ran = []
    for samples in rounds(places, 3, range(len(places))):
        assert len(samples) == 3
        ran += [sample for place, sample in enumerate(samples) if places[sample] == place]
    assert sorted(ran) == list(range(len(places)))
