"""Plans of passes against torch operations, and what they are not made of."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from ptq_tdq.errors import RuntimeUnsupportedError
from ptq_tdq.rotate import rotated
from ptq_tdq.runtime.kernels import NOTHING, Grid, TokenNorm, reference_quantize
from ptq_tdq.runtime.layer import WeightOnlyLayer
from ptq_tdq.runtime.native_layer import NativeLayer
from ptq_tdq.runtime.passes import Modulation, Place, Plan
from ptq_tdq.runtime.products import FloatProducts, Geometry, NativeProducts, Weights
from ptq_tdq.runtime.step import Interval

QUANTIZER = SimpleNamespace(name="x", bits=8)


class Step:
    """Intervals of three quantizers, of which the second is asked for."""

    def __init__(self, samples: int, *, each: bool) -> None:
        shape = (3, samples) if each else (3,)
        self.scale = torch.rand(shape) * 0.02 + 0.02
        self.zero_point = torch.randint(90, 140, shape, dtype=torch.int32)

    def together(self, rows: int) -> Interval:
        return Interval(self.scale, self.zero_point)

    def columns(self, quantizers: Any) -> range:
        return range(1, 2)

    def own(self) -> Interval:
        return Interval(self.scale[1].reshape(-1), self.zero_point[1].reshape(-1))


def normalized_tokens(x: Tensor, norm: TokenNorm, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """x [B, N, C] behind a norm, times ``1 + scale`` plus ``shift`` (both [B, C])."""
    weight, bias, size = norm.weight, norm.bias, x.shape[-1:]
    if norm.centered:
        y = functional.layer_norm(x, size, weight, bias, norm.epsilon)
    else:
        y = functional.rms_norm(x, size, weight, norm.epsilon)
        y = y if bias is None else y + bias
    y = y if scale is None else y * (1 + scale.unsqueeze(1))
    return y if shift is None else y + shift.unsqueeze(1)


def result_of(plan: Plan, place: Place, *tensors: Tensor) -> Tensor:
    """What a plan leaves in the place of the tensor that was announced last."""
    out = torch.full(place.shape, torch.nan)
    plan(*tensors, out)
    return out


@pytest.mark.parametrize("centered", [True, False], ids=["layer norm", "rms norm"])
@pytest.mark.parametrize("affine", ["none", "weight", "both"])
@pytest.mark.parametrize("rows", [0, 1, 3])
@pytest.mark.parametrize(("channels", "rotate"), [(1, False), (20, True), (67, False), (192, True)])
def test_norms_are_those_of_torch(
    library: ctypes.CDLL, centered: bool, affine: str, rows: int, channels: int, rotate: bool
) -> None:
    torch.manual_seed(0)
    x, modulations = torch.randn(3, 5, channels) * 3 + 20, torch.randn(max(1, rows), 6, channels)
    weight, bias = torch.randn(2, channels)
    norm = TokenNorm(None if affine == "none" else weight, bias if affine == "both" else None, 1e-5, centered)
    step = Step(3, each=False)
    plan = Plan(library, step, 3, each=False)  # type: ignore[arg-type]
    place, chosen = plan.given("x", x.shape), plan.given("modulations", modulations.shape)
    out = plan.given("out", x.shape)
    plan.between = lambda *shape: out  # type: ignore[method-assign]
    plan.normalize(place, norm, Modulation(chosen.chunk(4), chosen.chunk(1)) if rows else None, rotate=rotate)
    scale, shift = (modulations[:, i].expand(3, -1) if rows else None for i in (4, 1))
    expected = normalized_tokens(x, norm, scale, shift)
    expected = rotated(expected) if rotate else expected
    torch.testing.assert_close(result_of(plan, out, x, modulations), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [0, 1, 3])
@pytest.mark.parametrize(("tokens", "outputs"), [(1, 8), (5, 33), (13, 16)])
def test_gates_and_sums_are_those_of_torch(
    library: ctypes.CDLL, each: bool, bits: int, rows: int, tokens: int, outputs: int
) -> None:
    torch.manual_seed(0)
    x, onto, gates = torch.randn(3, tokens, 12), torch.randn(3, tokens, outputs), torch.randn(max(1, rows), 6, outputs)
    codes = torch.randint(0, 2**bits, (outputs, 12, 1, 1), dtype=torch.uint8)
    zero = torch.full((outputs,), 2 ** (bits - 1), dtype=torch.int32)
    weights = Weights(codes, bits, torch.rand(outputs) + 0.1, zero, torch.randn(outputs))
    grid, step = Grid((0, 12), 12, 8), Step(3, each=each)
    native = NativeLayer(library, grid, NativeProducts(weights, Geometry(), library))
    layer: Any = SimpleNamespace(
        parts=[SimpleNamespace(native=native, quantizer=QUANTIZER)], step=step, before=lambda activation: NOTHING
    )
    plan = Plan(library, step, 3, each=each)  # type: ignore[arg-type]
    places = [plan.given("x", t.shape) for t in (x, onto, gates)]
    out = plan.given("out", onto.shape)
    plan.layer(layer, places[0], onto=places[1], gate=places[2].chunk(5) if rows else None, to=out)
    with pytest.raises(RuntimeUnsupportedError, match="do not fit None"):
        plan.layer(layer, places[0], gate=places[2].chunk(5), to=out)
    image, interval = x.transpose(1, 2).unsqueeze(2), step.own()
    quantized = reference_quantize(image, grid, *interval)
    y = FloatProducts(weights, Geometry())(quantized, interval, None).squeeze(2).transpose(1, 2)
    expected = (y * gates[:, 5, None] if rows else y) + onto
    found = result_of(plan, out, x, onto, gates)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    plan(x, found.copy_(onto), gates, found)  # onto what is there
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("rows", [1, 8])
def test_weights_of_integers(library: ctypes.CDLL, silu: bool, biased: bool, rows: int) -> None:
    torch.manual_seed(0)
    codes = torch.randint(-128, 128, (21, 37), dtype=torch.int8)
    layer = WeightOnlyLayer(nn.Linear(37, 21), codes, torch.rand(21), torch.randn(21) if biased else None)
    x, onto = torch.randn(rows, 37), torch.randn(rows, 21)
    plan = Plan(library, Step(1, each=False), 1, each=False)  # type: ignore[arg-type]
    places, out = [plan.given("x", t.shape) for t in (x, onto)], plan.given("out", onto.shape)
    plan.between = lambda *shape: out  # type: ignore[method-assign]
    plan.weight_only(layer, places[0], silu=silu, onto=places[1])
    expected = layer(functional.silu(x) if silu else x) + onto
    torch.testing.assert_close(result_of(plan, out, x, onto), expected, rtol=1e-4, atol=1e-3)


def test_what_does_not_fit_is_not_planned_and_not_computed(library: ctypes.CDLL) -> None:
    plan = Plan(library, Step(3, each=False), 3, each=False)  # type: ignore[arg-type]
    x, rows = plan.given("x", (3, 5, 8)), plan.given("rows", (2, 6, 8))
    norm = TokenNorm(None, None, 1e-5)
    with pytest.raises(RuntimeUnsupportedError, match="no rows of 8 for 3 samples"):
        plan.normalize(x, norm, Modulation(rows.chunk(0), rows.chunk(1)), rotate=False)
    with pytest.raises(RuntimeUnsupportedError, match="take the weight of a norm as"):
        plan.normalize(x, TokenNorm(torch.ones(7), None, 1e-5), None, rotate=False)
    layer = WeightOnlyLayer(nn.Linear(4, 4), torch.zeros(4, 4, dtype=torch.int8), torch.ones(4), None)
    with pytest.raises(RuntimeUnsupportedError, match="take weights as"):
        plan.weight_only(layer, plan.given("y", (1, 5)))
    plan.normalize(x, norm, None, rotate=False)
    given = torch.zeros(3, 5, 8), torch.zeros(2, 6, 8), torch.zeros(1, 5)
    plan(*given)
    wrong = given[0].double(), given[0].transpose(0, 1), given[0][:2], given[0].to("meta")
    for tensor in wrong:
        with pytest.raises(RuntimeUnsupportedError, match="The integer kernels take x as"):
            plan(tensor, *given[1:])
    with pytest.raises(ValueError, match="argument"):
        plan(*given[:2])


def test_intervals_of_another_number_of_samples_are_refused(library: ctypes.CDLL) -> None:
    plan = Plan(library, Step(3, each=True), 3, each=False)  # type: ignore[arg-type]
    with pytest.raises(RuntimeUnsupportedError, match="take scales as"):
        plan()
