"""Moments of a layer's inputs against what the layer itself computes from them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from unit_calls import call_of

from ptq_tdq.modules import QuantLayer, layer_kind
from ptq_tdq.recon.moments import inputs
from ptq_tdq.recon.unit import Unit
from ptq_tdq.recon.visits import visiting
from ptq_tdq.records import LayerRecord, QuantizerRecord

N = 9
LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(6, 4), (6,)),
    "linear-tokens": (nn.Linear(6, 4), (5, 6)),
    "conv1d": (nn.Conv1d(6, 4, 3, padding=1), (6, 8)),
    "conv2d-stride": (nn.Conv2d(6, 4, 3, padding=1, stride=2), (6, 7, 8)),
    "conv2d-same": (nn.Conv2d(6, 4, (3, 1), dilation=(2, 1), padding="same"), (6, 4, 4)),
    "conv2d-circular": (nn.Conv2d(6, 4, 3, padding=1, padding_mode="circular", bias=False), (6, 5, 5)),
    "conv2d-groups": (nn.Conv2d(6, 4, 3, groups=2), (6, 4, 5)),
    "conv3d": (nn.Conv3d(6, 4, (1, 3, 2), padding=1), (6, 2, 4, 3)),
    "transposed-1d": (nn.ConvTranspose1d(6, 4, 4, stride=3, padding=1, output_padding=2, dilation=2), (6, 5)),
    "transposed-2d": (nn.ConvTranspose2d(6, 4, (4, 3), stride=2, padding=(1, 0), bias=False), (6, 4, 3)),
    "transposed-2d-groups": (nn.ConvTranspose2d(6, 4, 2, groups=2, padding=1), (6, 4, 3)),
    "transposed-3d": (nn.ConvTranspose3d(6, 4, 2, stride=(1, 2, 2)), (6, 2, 3, 2)),
}


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_moments_of_the_inputs_give_those_of_the_outputs(name: str, centred: bool) -> None:
    """E[(W x_hat)(W x_hat)^T] = W H W^T, and alike for the means and the lost part, over all positions."""
    layer, shape = LAYERS[name]
    layer.requires_grad_(False)
    kind = layer_kind(layer)
    assert kind is not None
    record = LayerRecord("a", kind, "a", (0, 6), 4, (QuantizerRecord("a", 4, "static", "mse"),))
    wrapped = QuantLayer(layer, record)
    unit = Unit("a", wrapped, torch.zeros(N))
    torch.manual_seed(0)
    full = torch.randn(N, *shape) + 1
    seen = full + 0.2 * torch.randn(N, *shape)
    calls = [call_of("a", value) for value in (full, seen)]
    with visiting(unit, *calls) as visits:
        (found,) = inputs(visits, [wrapped], torch.Generator().manual_seed(0))

    def outputs(x: Tensor) -> Tensor:
        y = layer(x) if layer.bias is None else layer(x) - layer(torch.zeros_like(x))
        dim = -1 if kind == "linear" else 1
        return y.movedim(dim, -1).flatten(0, -2).double()

    y, lost = outputs(seen), outputs(full) - outputs(seen)
    about = (y.mean(0), lost.mean(0)) if centred else (torch.zeros(4), torch.zeros(4))
    groups = len(found)
    weights = wrapped.weight.flatten(1).double().chunk(groups)
    parts = zip(found, weights, y.chunk(groups, 1), lost.chunk(groups, 1), strict=True)
    for i, (m, weight, a, d) in enumerate(parts):
        mean_a, mean_d = (value.chunk(groups)[i] for value in about)
        hessian, (cross,) = m.close(centred=centred).moments(slice(0, weight.shape[1]))
        torch.testing.assert_close(weight @ m.mean, a.mean(0), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(m.lost, d.mean(0), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            weight @ hessian @ weight.T, (a - mean_a).T @ (a - mean_a) / len(a), rtol=1e-3, atol=1e-4
        )
        torch.testing.assert_close(cross @ weight.T, (d - mean_d).T @ (a - mean_a) / len(a), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e38])
def test_moments_of_hostile_inputs_are_finite_and_semidefinite(size: float, centred: bool) -> None:
    """Constant, dead and repeated channels, a mean far above the deviation, and squares beyond float32."""
    layer = nn.Linear(6, 4).requires_grad_(False)
    record = LayerRecord("a", "linear", "a", (0, 6), 4, (QuantizerRecord("a", 4, "static", "mse"),))
    wrapped = QuantLayer(layer, record)
    torch.manual_seed(0)
    full = torch.rand(200, 6)
    full[:, 0], full[:, 1], full[:, 3], full[:, 4] = 0.0, 0.7, full[:, 2], 1 + 1e-6 * full[:, 4]
    unit = Unit("a", wrapped, torch.zeros(200))
    calls = [call_of("a", value * size) for value in (full, 0.9 * full)]
    with visiting(unit, *calls) as visits:
        ((rows,),) = inputs(visits, [wrapped], torch.Generator().manual_seed(0))
    rows.close(centred=centred)
    hessian, (cross,) = rows.moments(slice(0, 6))
    assert all(bool(value.isfinite().all()) for value in (hessian, cross, rows.mean, rows.lost))
    assert bool((hessian[0] == 0).all()) and (not centred or bool((hessian[1] == 0).all()))
    spread = hessian.diagonal().sqrt().clamp(min=1e-300)
    assert torch.linalg.eigvalsh(hessian / spread[:, None] / spread).min() > -1e-5
    if centred:
        expected = (0.9 * full * torch.tensor(size)).double().var(0, correction=0)
        torch.testing.assert_close(hessian.diagonal(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("weights", [0.1, 1e-30])
def test_differences_beyond_float32_are_finite(weights: float) -> None:
    """Both streams fit float32, what lies between them does not; nor does it without the size of the weights."""
    layer = nn.Linear(64, 4).requires_grad_(False)
    wrapped = QuantLayer(
        layer, LayerRecord("a", "linear", "a", (0, 64), 4, (QuantizerRecord("a", 4, "static", "mse"),))
    )
    full = 3e38 * (1 - torch.rand(20, 64, generator=torch.Generator().manual_seed(0)) / 4)
    calls = [call_of("a", value) for value in (full, -full)]
    with torch.no_grad():
        wrapped.weight.copy_(weights * torch.eye(4, 64) + weights / 100)
    with visiting(Unit("a", wrapped, torch.zeros(20)), *calls) as visits:
        ((rows,),) = inputs(visits, [wrapped], torch.Generator().manual_seed(0))
    expected = (2 * full.double() @ wrapped.weight.double().t()).mean(0)
    torch.testing.assert_close(rows.close(centred=True).lost, expected, rtol=1e-5, atol=0)
