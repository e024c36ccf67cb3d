"""Inputs equalized or rotated: what that leaves as it was, and what it gains where a few channels are large."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ptq_tdq import calibrate, preset, record
from ptq_tdq.artifacts import read_artifact
from ptq_tdq.load import load_quantized
from ptq_tdq.modules import QuantLayer
from ptq_tdq.recon.transform import best_transform, power_of_two
from ptq_tdq.records import LayerRecord, QuantizerRecord
from ptq_tdq.runtime import IntegerModel

CHOICES = {
    "scheme": "W8A4",
    "method": "static",
    "equalize": "channels",
    "activation_iterations": 0,
    "fixed_layers": (),
    "eight_bit_layers": (),
    "weight_only_layers": (),
    "float_input_layers": (),
}
SIZE = torch.where(torch.arange(32) % 8 == 0, 64.0, 1.0)  # of the channels: a few are large


def tokens(rows: int = 512, seed: int = 0) -> Tensor:
    return torch.randn(rows, 32, generator=torch.Generator().manual_seed(seed)) * SIZE


def layer_of(method: str = "static", bits: int = 4) -> QuantLayer:
    torch.manual_seed(0)
    linear = nn.Linear(32, 16).requires_grad_(False)
    quantizer = QuantizerRecord("layer", bits, method, "mse")
    return QuantLayer(linear, LayerRecord("layer", "linear", "layer", (0, 32), 8, (quantizer,)))


class Spiky(nn.Module):
    """A norm whose weight makes a few channels large, and the layers that take that up."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 32), nn.Linear(32, 32)
        self.norm.weight.data.copy_(SIZE)
        self.up.weight.data.div_(SIZE)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


def denoiser() -> nn.Module:
    torch.manual_seed(0)
    return Spiky().eval().requires_grad_(False)


def calls_of(model: nn.Module) -> object:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad(), record(model, num_train_timesteps=1000) as calls:
        for t in (1000.0, 500.0, 1.0):
            model(torch.randn(8, 16, 32, generator=generator), torch.full((8,), t))
    return calls


def test_factors_are_powers_of_two_about_one() -> None:
    factors = power_of_two(torch.tensor([1.0, 3.0, 0.2, 1e30, 0.0]))
    assert bool((factors.log2() == factors.log2().round()).all())
    assert torch.equal(power_of_two(torch.full((4,), 7.0)), torch.ones(4))
    assert torch.equal(power_of_two(SIZE * 3), power_of_two(SIZE)), "the unit of the channels does not matter"


def test_an_equalized_layer_computes_the_same_digits() -> None:
    layer, x = layer_of(), tokens()
    before = layer(x)
    layer.equalize(power_of_two(SIZE))
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize("method", ["static", "dynamic-token"])
def test_a_layer_with_a_few_large_channels_is_equalized(method: str) -> None:
    layer, x = layer_of(method), tokens()
    divisor, _ = best_transform(layer, x, torch.zeros(len(x), dtype=torch.int64), preset("default", **CHOICES))
    assert divisor[SIZE > 1].min() >= 4 * divisor[SIZE == 1].max()


def test_a_layer_whose_channels_are_alike_is_left_alone() -> None:
    layer, x = layer_of(), tokens() / SIZE
    divisor, _ = best_transform(layer, x, torch.zeros(len(x), dtype=torch.int64), preset("default", **CHOICES))
    assert torch.equal(divisor, torch.ones(32))


def test_it_halves_the_error_and_the_artifact_keeps_it_in_both_backends(tmp_path: Path) -> None:
    model = denoiser()
    calls, x, t = calls_of(model), torch.randn(8, 16, 32), torch.tensor([500.0])
    expected = model(x, t)
    error = {}
    for choice in ("none", "channels"):
        quantized = calibrate(model, preset("default", **CHOICES | {"equalize": choice}), calls)  # type: ignore[arg-type]
        error[choice] = float((quantized(x, t) - expected).pow(2).mean())
    assert error["channels"] < 0.5 * error["none"]
    quantized.save_pretrained(tmp_path / "artifact")
    artifact = read_artifact(tmp_path / "artifact")
    assert "up" in artifact.divisors
    loaded = load_quantized(tmp_path / "artifact", model=copy.deepcopy(model))
    assert torch.equal(loaded(x, t), quantized(x, t))
    torch.testing.assert_close(
        IntegerModel(copy.deepcopy(model), artifact)(x, t), quantized(x, t), rtol=1e-4, atol=1e-4
    )


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    model = denoiser()
    calls, config = calls_of(model), preset("default", **CHOICES)
    first = calibrate(model, config, calls, run_directory=tmp_path).to_artifact()  # type: ignore[arg-type]
    next(tmp_path.glob("activations-*")).unlink()
    again = calibrate(model, config, calls, run_directory=tmp_path).to_artifact()  # type: ignore[arg-type]
    assert first.divisors.keys() == again.divisors.keys() != set()
    for name, divisor in first.divisors.items():
        assert torch.equal(divisor, again.divisors[name])
        assert torch.equal(first.weight_codes[name], again.weight_codes[name])


def test_auto_rotates_the_layers_that_gain_by_it_and_remembers_which(tmp_path: Path) -> None:
    model, choices = denoiser(), CHOICES | {"scheme": "W8A6", "equalize": "none", "rotate": "auto"}
    calls = calls_of(model)
    first, again = (
        calibrate(model, preset("default", **choices), calls, run_directory=tmp_path)  # type: ignore[arg-type]
        for _ in range(2)
    )
    turned = {layer.name: layer.rotated for layer in first.plan}
    assert turned["up"] and turned == {layer.name: layer.rotated for layer in again.plan}
    x, t = torch.randn(2, 16, 32), torch.tensor([500.0])
    assert torch.equal(first(x, t), again(x, t))
    assert IntegerModel(copy.deepcopy(model), first.to_artifact()).facts["integer_layers"] == 2
