"""The rotation of channels: orthogonal, Hadamard's where it can be, and the same in both backends."""

from __future__ import annotations

import copy
import ctypes
from pathlib import Path

import pytest
import torch
from hostile import run_python
from scipy.linalg import hadamard
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ptq_tdq import Calls, calibrate, preset, record
from ptq_tdq.artifacts import read_artifact
from ptq_tdq.export.onnx import OnnxDenoiser, export_onnx
from ptq_tdq.load import load_quantized
from ptq_tdq.modules import QuantLayer
from ptq_tdq.records import LayerRecord, QuantizerRecord
from ptq_tdq.rotate import factors, rotated, signs
from ptq_tdq.runtime import IntegerModel
from ptq_tdq.runtime.native import native_rotate, open_library

CHOICES = {
    "scheme": "W8A8",
    "method": "static",
    "rounding": "nearest",
    "activation_iterations": 0,
    "fixed_layers": (),
    "eight_bit_layers": (),
    "weight_only_layers": (),
}


@pytest.mark.parametrize("channels", [1, 2, 3, 8, 12, 64, 192, 768, 1152])
def test_it_is_orthogonal(channels: int) -> None:
    matrix = rotated(torch.eye(channels, dtype=torch.float64))
    torch.testing.assert_close(matrix @ matrix.t(), torch.eye(channels, dtype=torch.float64))


@pytest.mark.parametrize("channels", [2, 8, 64, 256])
def test_for_a_power_of_two_it_is_the_matrix_of_hadamard_with_signs(channels: int) -> None:
    expected = torch.tensor(hadamard(channels), dtype=torch.float64) / channels**0.5
    found = rotated(torch.eye(channels, dtype=torch.float64))  # its rows are the images of the channels
    torch.testing.assert_close(found, expected * found[:, :1].sign())


@pytest.mark.parametrize(("channels", "columns"), [(1, 32), (64, 32), (192, 64), (768, 32), (20, 8)])
def test_its_factors_are_two_small_matrices(channels: int, columns: int) -> None:
    left, right = factors(channels, columns)
    assert len(right) <= columns
    matrix = torch.kron(left, right) * signs(channels)
    torch.testing.assert_close(rotated(torch.eye(channels)).t(), matrix)


@pytest.mark.parametrize("channels", [64, 192, 256, 1152])
def test_what_channels_have_in_common_is_spread_too(channels: int) -> None:
    """Without the signs one channel would hold it all: sqrt(C) times the mean."""
    assert rotated(torch.ones(channels)).abs().max() < 3


@pytest.mark.parametrize("channels", [96, 192, 320, 1152])
def test_one_large_channel_is_spread_over_all(channels: int) -> None:
    assert (rotated(torch.eye(channels)).abs() > 0).all()


@pytest.mark.parametrize("shape", [(5, 1), (3, 12), (2, 7, 192), (1, 2, 3, 64), (0, 8)])
def test_the_kernel_computes_the_same(shape: tuple[int, ...]) -> None:
    library = open_library()
    if not isinstance(library, ctypes.CDLL):
        pytest.skip(library)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(native_rotate(library)(x), rotated(x))


def test_a_rotated_layer_is_the_original_until_something_is_quantized() -> None:
    linear = nn.Linear(24, 8).requires_grad_(False)
    quantizer = QuantizerRecord("layer", 8, "static", "mse")
    known = LayerRecord("layer", "linear", "layer", (0, 24), 8, (quantizer,), rotated=True)
    layer = QuantLayer(copy.deepcopy(linear), known)
    x = torch.randn(5, 24)
    assert torch.equal(layer(x), linear(x))
    torch.testing.assert_close(layer.quantized_input(x) @ layer.weight.t(), x @ linear.weight.t())


class Spiky(nn.Module):
    """A layer behind a norm that makes a few channels large, which the layer takes up."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.layer = nn.LayerNorm(48), nn.Linear(48, 48)
        self.norm.weight.data[::16] = 64
        self.layer.weight.data[:, ::16] /= 64

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return x + self.layer(self.norm(x))


@pytest.fixture(scope="module")
def spiky() -> tuple[nn.Module, Calls]:
    model = Spiky().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad(), record(model, num_train_timesteps=1000) as calls:
        for t in (1000.0, 500.0, 1.0):
            model(torch.randn(8, 16, 48, generator=generator), torch.full((8,), t))
    return model, calls


@pytest.mark.parametrize("method", ["static", "dynamic-token"])
def test_it_lowers_the_error_and_runs_in_integers(spiky: tuple[nn.Module, Calls], method: str, tmp_path: Path) -> None:
    model, calls = spiky
    x, t = torch.randn(8, 16, 48), torch.tensor([500.0])
    expected, error = model(x, t), {}
    for choice in ("none", "hadamard"):
        quantized = calibrate(model, preset("default", **CHOICES | {"rotate": choice, "method": method}), calls)
        error[choice] = float((quantized(x, t) - expected).pow(2).mean())
    assert error["hadamard"] < 0.5 * error["none"]
    quantized.save_pretrained(tmp_path / "artifact")
    loaded = load_quantized(tmp_path / "artifact", model=copy.deepcopy(model))
    assert torch.equal(loaded(x, t), quantized(x, t))
    integer = IntegerModel(copy.deepcopy(model), read_artifact(tmp_path / "artifact"))
    off = (integer(x, t) - quantized(x, t)).pow(2).mean()
    assert off < 1e-3 * error["hadamard"], "a tie here or there"


@pytest.mark.parametrize("choices", [{"rotate": "hadamard"}, {"equalize": "channels"}], ids=["rotated", "equalized"])
def test_it_becomes_a_graph(spiky: tuple[nn.Module, Calls], choices: dict[str, str], tmp_path: Path) -> None:
    model, calls = spiky
    quantized = calibrate(model, preset("default", **CHOICES | choices), calls)
    artifact = quantized.to_artifact()
    assert artifact.divisors or any(layer.rotated for layer in artifact.layers)
    export_onnx(artifact, tmp_path / "model.onnx", "portable", calls, model=copy.deepcopy(model))
    x, t = torch.randn(8, 16, 48), torch.full((8,), 500.0)
    found = OnnxDenoiser(tmp_path / "model.onnx", runtime="onnxruntime", threads=1)(x=x, timestep=t)
    (y,), expected = pytree.tree_leaves(found), quantized(x, t)
    assert (y - expected).pow(2).mean() < 1e-4 * (expected - x).pow(2).mean(), "a tie here or there"


FIRST = """
import sys
import torch
from torch._subclasses import FakeTensorMode
from ptq_tdq.rotate import factors, rotated, signs

class Model(torch.nn.Module):
    def forward(self, x):
        return rotated(x)

x = torch.randn(3, 96)
if sys.argv[1] == "an export":
    torch.export.export(Model(), (x,), strict=False)
elif sys.argv[1] == "fake tensors":
    with FakeTensorMode():
        rotated(torch.randn(3, 96))
else:
    with torch.inference_mode():
        rotated(x)
x.requires_grad_()
rotated(x).sum().backward()
assert type(rotated(x)) is torch.Tensor and x.grad.isfinite().all()
"""


@pytest.mark.parametrize("first", ["an export", "fake tensors", "inference"])
def test_what_runs_first_leaves_nothing_that_a_later_call_cannot_use(first: str) -> None:
    done = run_python(FIRST, first)
    assert done.returncode == 0, done.stderr[-2000:]
