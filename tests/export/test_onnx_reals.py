"""A traced program with complex numbers computes the same with pairs of real ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ptq_tdq.artifacts import Artifact
from ptq_tdq.calls import Calls
from ptq_tdq.errors import ModelError
from ptq_tdq.evaluate.metrics import sqnr_db
from ptq_tdq.export.onnx import OnnxDenoiser, export_onnx
from ptq_tdq.export.onnx.reals import InReals, has_complex
from ptq_tdq.load import build_quantized

Operation = Callable[[Tensor, Tensor], Any]
SAME: dict[str, Operation] = {
    "product": lambda z, w: z * w,
    "real factor": lambda z, w: z * w.real,
    "real factor first": lambda z, w: w.imag * z,
    "number": lambda z, w: 0.5 * z,
    "rows": lambda z, w: torch.cat([z[1:], w[:, None].squeeze(1)[0:1]]).repeat(2, 1),
    "columns": lambda z, w: torch.cat(z.split([1, 3], -1)[::-1], -1) * w,
    "axes": lambda z, w: torch.stack([z, w]).permute(1, 0, 2).transpose(0, -1).reshape(8, -1).unflatten(0, (2, -1)),
    "gather": lambda z, w: z[torch.tensor([2, 0, 0])].unsqueeze(0).expand(2, -1, -1).flatten(0, 1),
    "precision": lambda z, w: z.to(torch.complex64) * w.to(torch.complex64),
    "sequences": lambda z, w: nn.utils.rnn.pad_sequence([z, w[:2]], batch_first=True),
    "by pieces": lambda z, w: torch.complex(z.imag, w.real).chunk(2, 1)[1].contiguous().view(-1),
}
REFUSED: dict[str, Operation] = {
    "absolute value": lambda z, w: z * w.abs(),
    "a real number added": lambda z, w: z + 1.0,
    "padded with ones": lambda z, w: nn.functional.pad(z, (0, 1), value=1.0),
}


class Traced(nn.Module):
    def __init__(self, operation: Operation) -> None:
        super().__init__()
        self.operation = operation
        self.w = torch.polar(torch.rand(3, 4).double() + 0.5, torch.randn(3, 4).double())

    def forward(self, tensors: dict[str, Tensor]) -> Tensor:
        z = torch.view_as_complex(tensors["x"].double().unflatten(-1, (-1, 2)))
        return torch.view_as_real(self.operation(z, self.w))


def in_reals(module: nn.Module, tensors: dict[str, Tensor]) -> InReals:
    exported = torch.export.export(module, (tensors,), strict=False)
    assert has_complex(exported)
    return InReals(exported)


@pytest.mark.parametrize("name", SAME)
def test_it_computes_the_same(name: str) -> None:
    torch.manual_seed(0)
    module, tensors = Traced(SAME[name]), {"x": torch.randn(3, 8)}
    found = in_reals(module, tensors)
    assert not has_complex(torch.export.export(found, (tensors,), strict=False))
    other = {"x": torch.randn(3, 8)}
    torch.testing.assert_close(found(other), module(other))


@pytest.mark.parametrize("name", REFUSED)
def test_what_parts_do_not_do_each_by_itself_is_refused(name: str) -> None:
    tensors = {"x": torch.randn(3, 8)}
    with pytest.raises(ModelError, match="complex numbers"):
        in_reals(Traced(REFUSED[name]), tensors)(tensors)


class Rotary(nn.Module):
    """Turns pairs of channels by angles that it is called with, as a complex tensor, and by ones of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)
        self.own = torch.polar(torch.ones(5, 4), torch.linspace(0, 3, 20).reshape(5, 4))

    def forward(self, sample: Tensor, timestep: Tensor, turns: Tensor) -> Tensor:
        """sample [B, 5, 8], turns complex [5, 4]."""
        z = torch.view_as_complex(self.first(sample).unflatten(-1, (-1, 2)))
        y = torch.view_as_real(z * turns * self.own).flatten(-2)
        return self.last(y * torch.cos(timestep / 1000)[:, None, None])


@torch.no_grad()
def test_a_graph_takes_complex_arguments(tmp_path: Path, quantize_model: Callable[..., tuple[Artifact, Calls]]) -> None:
    torch.manual_seed(0)
    t, turns = torch.tensor([900.0, 100.0]), torch.polar(torch.ones(5, 4), torch.randn(5, 4))
    artifact, calls = quantize_model(Rotary(), sample=torch.randn(2, 5, 8), timestep=t, turns=turns)
    export_onnx(artifact, tmp_path / "model.onnx", "portable", calls, model=Rotary())
    graph, simulated = OnnxDenoiser(tmp_path / "model.onnx", threads=1), build_quantized(artifact, Rotary())
    x, turns = torch.randn(2, 5, 8), torch.polar(torch.ones(5, 4), torch.randn(5, 4))
    assert sqnr_db(simulated(x, t, turns), graph(x, t, turns)) > 100
